"""`pumer demo`: the shipped models answer questions about pictures, unreduced and reduced, side by
side."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.progress import Progress
from rich.table import Table

import pumer
from pumer._files import replacing
from pumer._options import Count, OutputFile, OutputFolder
from pumer._rows import RowFile
from pumer._shipped import SHIPPED
from pumer._terminal import console
from pumer.lab.bench.memory import peak_activations
from pumer.lab.bench.records import environment
from pumer.lab.bench.timing import alternate
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.commands.viz import show
from pumer.lab.data.images import KeepAspect, open_image, pad_images
from pumer.lab.data.text import TextTransform
from pumer.lab.evaluate import evaluate, model_inputs
from pumer.lab.scenes.tasks import Scenes
from pumer.presets import PRESETS
from pumer.reducers import Reducer
from pumer.viz import draw, gallery

BASE, REDUCED = "scenes-vilt", "scenes-vilt-pumer"
COLUMNS = (
    "variant",
    "reducer",
    "questions",
    "seed",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "kinds",
    "batch_size",
    "median_s",
    "p20_s",
    "p80_s",
    "peak_activation_bytes",
    "gmacs",
    "tokens",
    *environment(),
)
"""Columns of the rows that `pumer demo` records."""


def demo(
    out: OutputFolder = "demo",
    questions: Count = 2000,
    batch_size: Count = 32,
    photographs: bool = True,
    seed: int = 7,
    record: OutputFile | None = None,
) -> None:
    """See what token reduction does, in about three minutes.

    Scores the shipped models on pictures that no training saw, times a full-size ViLT-B/32 on real
    photographs, and draws which tokens were kept, merged and dropped.

    Args:
        out: folder for the pictures and the page; what an earlier demo wrote there is replaced.
        questions: number of test questions.
        batch_size: examples at a time.
        photographs: also time a full-size model (random weights) on the photographs that come
            along.
        seed: seed of the test images.
        record: CSV file to add the rows to.
    """
    lines = RowFile(record, COLUMNS)
    screen = console()
    variants = _variants()
    task = Scenes(questions=questions, per_picture=2, seed=seed)
    rows = _score(variants, task, batch_size)
    screen.print(_table(rows, questions))
    base, reduced = rows["base"], rows["PuMer"]
    screen.print(
        f"PuMer: {reduced['per_second'] / base['per_second']:.2f}x the speed, "
        f"{reduced['memory'] / base['memory']:.0%} of the memory, "
        f"{reduced['metric']['accuracy'] - base['metric']['accuracy']:+.1f} points.\n"
    )
    if photographs:
        screen.print(photograph_table())
    lines.append([_record(name, row, questions, batch_size, seed) for name, row in rows.items()])
    pages = _draw(Path(out), variants["PuMer"][0], task)
    screen.print(f"Which tokens were kept, merged and dropped: {pages[0]} and {pages[1]}")


def _variants() -> dict[str, tuple[str, Reducer | None]]:
    """Name -> (shipped model, reducer; None for the model's own). Rivals act on the base model, at
    PuMer's lengths."""
    model = open_model(REDUCED, None)
    pumered = pumer.active(model)
    assert pumered is not None
    lengths = [image for _, image in pumer.report(model).lengths]
    merged = [before - after for before, after in pairwise(lengths)]
    layers = tuple(layer for layer, count in enumerate(merged) if count)
    kept = ((lengths[-1] - 1) / (lengths[0] - 1)) ** (1 / len(layers))
    return {
        "base": (BASE, pumer.Unreduced()),
        "PuMer": (REDUCED, None),
        "PuMer, untrained": (BASE, pumered.reducer),
        "ToMe": (BASE, pumer.ToMe(r=merged, depth=len(merged))),
        "random": (BASE, pumer.Random(prune=1 - kept, layers=layers)),
        "uniform": (BASE, pumer.Uniform(prune=1 - kept, layers=layers)),
        "no vision": (BASE, pumer.NoVision()),
    }


def _score(
    variants: dict[str, tuple[str, Reducer | None]], task: Scenes, batch_size: int
) -> dict[str, dict[str, Any]]:
    examples = task.examples("test")[:]
    rows: dict[str, dict[str, Any]] = {}
    models = {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("answering", total=len(variants))
        for name, (folder, reducer) in variants.items():
            model = open_model(folder, None)
            if reducer is not None:
                pumer.apply(model, reducer)
            collator = open_task(folder, model, {"name": "scenes"})
            result = evaluate(model, examples, collator, batch_size=batch_size)
            models[name] = model
            batch = model_inputs(collator(examples[:batch_size]))
            report = pumer.report(model, text=batch["input_ids"].shape[1])
            memory = peak_activations(partial(_forward, model, batch))
            rows[name] = {"metric": result.metric, "memory": memory, "report": report}
            progress.advance(bar)
    calls = {name: partial(_forward, model, batch) for name, model in models.items()}
    for name, timing in alternate(calls, runs=7).items():
        rows[name]["timing"], rows[name]["per_second"] = timing, batch_size / timing.median
    return rows


@torch.inference_mode()
def _forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch)


def _record(
    name: str, row: dict[str, Any], questions: int, batch_size: int, seed: int
) -> dict[str, Any]:
    metric, report, timing = row["metric"], row["report"], row["timing"]
    return {
        "variant": name,
        "reducer": json.dumps(report.reducer),
        "questions": questions,
        "seed": seed,
        **{key: metric[key] for key in ("accuracy", "accuracy_low", "accuracy_high")},
        "kinds": json.dumps(
            {key: value for key, value in metric.items() if not key.startswith("accuracy")}
        ),
        "batch_size": batch_size,
        "median_s": round(timing.median, 5),
        "p20_s": round(timing.p20, 5),
        "p80_s": round(timing.p80, 5),
        "peak_activation_bytes": row["memory"],
        "gmacs": round(report.macs / 1e9, 4),
        "tokens": json.dumps(report.lengths),
        **environment(),
    }


def _table(rows: dict[str, dict[str, Any]], questions: int) -> Table:
    table = Table(
        title=f"Shipped ViLT, {questions} questions about unseen pictures",
        box=box.SIMPLE,
        padding=0,
    )
    for name in ("", "accuracy, interval", "ex/s", "MB", "GFLOPs", "image tokens by layer"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name, row in rows.items():
        metric, report = row["metric"], row["report"]
        table.add_row(
            name,
            f"{metric['accuracy']:.1f} "
            f"({metric['accuracy_low']:.1f}-{metric['accuracy_high']:.1f})",
            f"{row['per_second']:.0f}",
            f"{row['memory'] / 2**20:.0f}",
            f"{2 * report.macs / 1e9:.2f}",
            " ".join(str(image) for _, image in report.lengths[1:]),
        )
    return table


def photograph_table(repeats: int = 5) -> Table:
    """Time a full-size ViLT-B/32 with random weights on the shipped photographs and their
    captions."""
    from transformers import AutoTokenizer, ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    model = ViltForQuestionAnswering(ViltConfig(num_labels=3129)).eval()
    rows = json.loads((SHIPPED / "photos" / "photos.json").read_text())
    transform = KeepAspect(384)
    pictures = [transform(open_image(SHIPPED / "photos" / row["file"])) for row in rows]
    text = TextTransform(AutoTokenizer.from_pretrained(SHIPPED / BASE), 40, padding="max_length")
    batch = text([row["caption"] for row in rows], [row["file"] for row in rows])
    batch["pixel_values"], batch["pixel_mask"] = pad_images(pictures)
    variants: dict[str, Reducer | None] = {
        "stock transformers": None,
        "fused, not reduced": pumer.Unreduced(),
        "PuMer (vilt-vqav2)": PRESETS["vilt-vqav2"],
    }
    calls = {name: partial(_as, model, reducer, batch) for name, reducer in variants.items()}
    medians = {
        name: timing.median for name, timing in alternate(calls, runs=repeats, warmup=1).items()
    }
    title = (
        f"ViLT-B/32 (random weights), {len(rows)} photographs of different shapes, 40 text tokens"
    )
    table = Table(title=title, box=box.SIMPLE)
    for name in ("", "examples/s", "x stock", "memory MB"):
        table.add_column(name, justify="left" if not name else "right")
    for name, call in calls.items():
        speed = medians["stock transformers"] / medians[name]
        memory = peak_activations(call)
        table.add_row(
            name, f"{len(rows) / medians[name]:.2f}", f"{speed:.2f}", f"{memory / 2**20:.0f}"
        )
    return table


def _as(model: Any, reducer: Reducer | None, batch: dict[str, torch.Tensor]) -> Any:
    pumer.remove(model) if reducer is None else pumer.apply(model, reducer)
    return _forward(model, batch)


def _draw(out: Path, model_name: str, task: Scenes, num_maps: int = 6) -> tuple[Path, Path]:
    """Token maps of the first few questions, as one PNG and one page."""
    model = open_model(model_name, None)
    collator = open_task(model_name, model, {"name": "scenes"})
    drawn = []
    for example in task.examples("test")[: 2 * num_maps : 2]:
        shown, picture, title = show(model, collator, example)
        drawn.append((draw(shown, picture, title), title))
    sheet = Image.new(
        "RGB", (max(d.width for d, _ in drawn), sum(d.height for d, _ in drawn)), "white"
    )
    y = 0
    for image, _ in drawn:
        sheet.paste(image, (0, y))
        y += image.height
    files = out / "tokens.png", out / "tokens.html"
    with replacing(files[0], "wb") as file:
        sheet.save(file, "PNG")
    gallery(drawn, files[1], "Which tokens were kept, merged and dropped")
    return files
