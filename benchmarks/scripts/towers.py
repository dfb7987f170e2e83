"""How much of what ToMe spares a vision tower in FLOPs it spares in time: rows of
`benchmarks/results/towers.csv`.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python benchmarks/scripts/towers.py

Towers of base size (`--layers` of them) with random weights at 384 pixels, stock and reduced in
turn. ToMe takes half of the tokens away, as many in every layer. Time is the CPU time of the
process, which a busy machine disturbs less than wall time; ratios of both are in the rows.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import pumer
from pumer.adapters import find
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.lab.bench.records import environment

RESULTS = Path(__file__).parents[1] / "results" / "towers.csv"
SIDE, PATCH = 384, 16
TOKENS = (SIDE // PATCH) ** 2
SIZES = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
BASE = SIZES | {"image_size": SIDE, "patch_size": PATCH}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = {
    "num_heads": 12,
    "patch_size": PATCH,
    "temporal_patch_size": 1,
    "spatial_merge_size": 2,
}
IDS = {"image_token_id": 60, "video_token_id": 61}
IDS |= {"vision_start_token_id": 62, "vision_end_token_id": 63}


def siglip2(layers: int) -> nn.Module:
    """The tower of SigLIP 2, for images of any shape."""
    config = transformers.Siglip2VisionConfig(
        **SIZES, num_hidden_layers=layers, patch_size=PATCH, num_patches=TOKENS
    )
    return transformers.Siglip2VisionModel(config)


def llava(layers: int) -> nn.Module:
    """LLaVA with CLIP's tower, of which the last layer is left out."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**BASE, num_hidden_layers=layers),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=60,
    )
    return transformers.LlavaForConditionalGeneration(config)


def internvl(layers: int) -> nn.Module:
    """InternVL, whose projector takes squares of four patches."""
    vision = transformers.InternVLVisionConfig(
        **SIZES,
        num_hidden_layers=layers,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
    )
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=60
    )
    return transformers.InternVLForConditionalGeneration(config)


def smolvlm(layers: int) -> nn.Module:
    """SmolVLM, whose connector takes squares of four patches."""
    config = transformers.SmolVLMConfig(
        vision_config=BASE | {"num_hidden_layers": layers},
        text_config=TEXT | {"model_type": "llama"},
        image_token_id=60,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def qwen2_vl(layers: int) -> nn.Module:
    """Qwen2-VL, whose images lie one behind the other."""
    vision = QWEN | {"depth": layers, "embed_dim": 768, "hidden_size": 64, "mlp_ratio": 4}
    config = transformers.Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=vision, **IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(layers: int) -> nn.Module:
    """Qwen2.5-VL, half of whose layers attend in windows here."""
    vision = QWEN | {
        "depth": layers,
        "hidden_size": 768,
        "out_hidden_size": 64,
        "intermediate_size": 3072,
        "window_size": 128,
        "fullatt_block_indexes": list(range(1, layers, 2)),
    }
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=vision, **IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral3(layers: int) -> nn.Module:
    """Mistral 3, whose tower is Pixtral's."""
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**BASE, num_hidden_layers=layers),
        text_config=transformers.MistralConfig(**TEXT),
        image_token_index=60,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def alone(name: str) -> Callable[[int], nn.Module]:
    """A tower by itself."""
    config = getattr(transformers, name.replace("Model", "Config"))
    sizes = {key: x for key, x in BASE.items() if key != "intermediate_size" or "Dino" not in name}
    return lambda layers: getattr(transformers, name)(config(**sizes, num_hidden_layers=layers))


TOWERS: dict[str, Callable[[int], nn.Module]] = {
    "CLIP": alone("CLIPVisionModel"),
    "SigLIP": alone("SiglipVisionModel"),
    "ViT": alone("ViTModel"),
    "DINOv2": alone("Dinov2Model"),
    "SigLIP 2": siglip2,
    "LLaVA (CLIP)": llava,
    "InternVL": internvl,
    "SmolVLM": smolvlm,
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Mistral 3 (Pixtral)": mistral3,
}


def inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    """Images as a tower takes them."""
    pixels = torch.randn(batch, 3, SIDE, SIDE)
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * batch)
    patches = torch.randn(batch, TOKENS, 3 * PATCH**2)
    if name == "SigLIP 2":
        mask = torch.ones(batch, TOKENS, dtype=torch.long)
        shapes = grid[:, 1:]
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if name.startswith("Qwen"):
        return {"pixel_values": patches.flatten(0, 1), "image_grid_thw": grid}
    if name == "SmolVLM":
        return {"pixel_values": pixels[:, None]}
    if name.startswith("Mistral"):
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, SIDE]] * batch)}
    return {"pixel_values": pixels}


def measure(name: str, layers: int, batch: int, runs: int) -> dict[str, Any]:
    """A row."""
    torch.manual_seed(0)
    model, images = TOWERS[name](layers).eval(), inputs(name, batch)
    adapter = find(model)
    inside = isinstance(adapter, DecoderAdapter)
    unit = adapter.patches_per_token(model) if isinstance(adapter, DecoderAdapter) else 1
    acts = adapter.tower_depth(model) if inside else layers
    tower = pumer.ToMe(r=TOKENS // unit // 2 // acts)
    reducer = pumer.Compose(tower, pumer.Unreduced()) if inside else tower
    parts = ("vision tower", "projection") if inside else ("embedding", "attention", "mlp", "head")
    trunk = adapter.trunk(model) if isinstance(adapter, DecoderAdapter) else None

    def macs() -> int:
        report = pumer.report(model, image=TOKENS // unit if inside else None)
        return sum(report.parts[part] for part in (*parts, "reducer"))

    base = macs()
    with pumer.reduced(model, reducer):
        reduced = macs()
    seconds: dict[str, list[tuple[float, float]]] = {"stock": [], "reduced": []}
    with torch.inference_mode():
        for round_index in range(runs + 1):
            for variant in ("stock", "reduced")[:: -1 if round_index % 2 else 1]:
                if variant == "reduced":
                    pumer.apply(model, reducer)
                wall, cpu = time.perf_counter(), time.process_time()
                # Looked up in every round: a method from before `apply` is the stock one.
                (model if trunk is None else trunk.get_image_features)(**images)
                took = time.process_time() - cpu, time.perf_counter() - wall
                pumer.remove(model)
                if round_index:  # the first round warms up
                    seconds[variant].append(took)
    (stock_cpu, stock_wall), (cpu, wall) = (
        [statistics.median(column) for column in zip(*times, strict=True)]
        for times in seconds.values()
    )
    ratio = base / reduced
    return environment() | {
        "tower": name,
        "layers": layers,
        "r": tower.r,
        "batch": batch,
        "pixels": SIDE,
        "runs": runs,
        "gmacs": round(base / 1e9, 2),
        "reduced_gmacs": round(reduced / 1e9, 2),
        "flops_ratio": round(ratio, 3),
        "cpu_s": round(stock_cpu, 3),
        "reduced_cpu_s": round(cpu, 3),
        "cpu_ratio": round(stock_cpu / cpu, 3),
        "wall_ratio": round(stock_wall / wall, 3),
        "realised": round(stock_cpu / cpu / ratio, 3),
        "realised_wall": round(stock_wall / wall / ratio, 3),
    }


def main() -> None:
    """Measure the towers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("towers", nargs="*", default=list(TOWERS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.towers or TOWERS:
        row = measure(name, arguments.layers, arguments.batch, arguments.runs)
        gc.collect()
        is_new = not RESULTS.exists()
        with RESULTS.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
