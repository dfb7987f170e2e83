"""Time PI0's chunks of actions with fewer image tokens, and count their FLOPs.

    python benchmarks/scripts/pi0.py ROWS.csv [RUNS]

Random weights in two shapes: "tiny", and "mid", a fifth of PI0's widths with all its image tokens
(two cameras of 256 each, 48 tokens of text, 50 actions, 10 steps). Unreduced and reduced models
take turns in one process. Times are of the processor, one thread: they bear a machine that has
other work better than times by the clock do.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

import pumer
from pumer._rows import append_rows
from pumer.lab.bench.records import environment

SHAPES = {
    "tiny": {"width": 64, "expert": 32, "layers": 4, "head_dim": 16, "vision": 64, "depth": 3},
    "mid": {"width": 384, "expert": 192, "layers": 8, "head_dim": 48, "vision": 288, "depth": 8},
}
CAMERAS, SIDE, PATCH, TEXT = 2, 224, 14, 48
REDUCERS = {
    "unreduced": pumer.Unreduced(),
    "DivPrune, keep 0.5": pumer.DivPrune(keep=0.5),
    "DivPrune, keep 0.25": pumer.DivPrune(keep=0.25),
    "FastV, keep 0.25, layer 2": pumer.FastV(keep=0.25, layer=2),
}


def new_model(shape: dict[str, int]) -> transformers.PI0ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 1000,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": shape["head_dim"],
    }
    width, expert = shape["width"], shape["expert"]
    vlm = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(
            **text, hidden_size=width, intermediate_size=8 * width
        ),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=shape["vision"],
            intermediate_size=4 * shape["vision"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=width,
            vision_use_head=False,
        ),
        projection_dim=width,
        image_token_id=999,
    )
    dit = transformers.GemmaConfig(**text, hidden_size=expert, intermediate_size=4 * expert)
    return transformers.PI0ForConditionalGeneration(
        transformers.PI0Config(vlm_config=vlm, dit_config=dit)
    ).eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = CAMERAS * (SIDE // PATCH) ** 2
    words = torch.randint(1, 900, (1, TEXT), generator=generator)
    ids = torch.cat([torch.full((1, tokens), 999), words], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, CAMERAS, 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": torch.ones(1, CAMERAS, dtype=torch.bool),
        "state": torch.randn(1, 32, generator=generator),
        "noise": torch.randn(1, 50, 32, generator=generator),
    }


def main(rows: Path, runs: int = 3) -> None:
    batch, tokens = inputs(), CAMERAS * (SIDE // PATCH) ** 2
    for name, shape in SHAPES.items():
        model = new_model(shape)
        times: dict[str, list[float]] = {method: [] for method in REDUCERS}
        for run in range(runs + 1):  # the first one warms up
            for method, reducer in REDUCERS.items():
                with pumer.reduced(model, reducer):
                    begun = time.process_time()
                    model.sample_actions(**batch)
                    if run:
                        times[method].append(time.process_time() - begun)
        for method, reducer in REDUCERS.items():
            with pumer.reduced(model, reducer):
                report = pumer.report(model, text=TEXT, image=tokens)
            median = statistics.median(times[method])
            row = {
                "model": name,
                "method": method,
                "cpu_seconds": round(median, 4),
                "fastest": round(min(times[method]), 4),
                "slowest": round(max(times[method]), 4),
                "gflops": round(2 * report.macs / 1e9, 3),
                "gflops_expert": round(2 * report.parts["expert"] / 1e9, 3),
                "gflops_tower": round(2 * report.parts["vision tower"] / 1e9, 3),
                "runs": runs,
            }
            print(row, flush=True)
            append_rows(rows, [row | environment()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, *more = sys.argv[1:]
    main(Path(target), *map(int, more))
