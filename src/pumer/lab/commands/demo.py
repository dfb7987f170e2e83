"""`pumer demo`: the shipped models answer questions about images, unreduced and reduced, side by
side."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from pumer.lab.commands.demo_page import Cells, demo_page
from pumer.lab.commands.viz import show
from pumer.lab.data.images import KeepAspect, open_image, pad_images
from pumer.lab.data.text import TextTransform
from pumer.lab.evaluate import evaluate, model_inputs
from pumer.lab.scenes.tasks import Scenes
from pumer.presets import PRESETS
from pumer.reducers import Reducer
from pumer.viz import TokenMap, draw

BASE, REDUCED = "scenes-vilt", "scenes-vilt-pumer"
_PHOTOGRAPH_RUNS = 5  # timed forwards of the full-size model, of each variant
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

    Scores the shipped models on images unseen in training, times a full-size ViLT-B/32 on real
    photographs, and writes a web page with the results and token maps.

    Args:
        out: folder for the page and the drawing; those of an earlier demo are replaced.
        questions: number of test questions.
        batch_size: examples at a time.
        photographs: also time a full-size model (random weights) on the shipped photographs.
        seed: seed of the test images.
        record: CSV file to add the rows to.
    """
    lines = RowFile(record, COLUMNS)
    screen = console()
    variants = _variants()
    task = Scenes(questions=questions, per_picture=2, seed=seed)
    rows = _score(variants, task, batch_size)
    scores = _score_cells(rows, questions)
    screen.print(_table(scores, no_wrap=True))
    base, reduced = rows["base"], rows["PuMer"]
    speed = f"{reduced['per_second'] / base['per_second']:.2f}x"
    memory = f"{reduced['memory'] / base['memory']:.0%}"
    points = f"{reduced['metric']['accuracy'] - base['metric']['accuracy']:+.1f}"
    screen.print(f"PuMer: {speed} the speed, {memory} of the memory, {points} points.\n")
    timings = None
    if photographs:
        timings = _photograph_cells()
        screen.print(_table(timings))
    lines.append([_record(name, row, questions, batch_size, seed) for name, row in rows.items()])
    tiles = [
        (speed, "the unreduced model's speed"),
        (f"{reduced['report'].macs / base['report'].macs:.0%}", "of its FLOPs"),
        (points, "points of accuracy"),
    ]
    maps = _token_maps(variants["PuMer"][0], task)
    page = demo_page(
        tiles, scores, timings, [shown.to_html(image, title) for shown, image, title in maps]
    )
    files = _write(Path(out), page, [draw(*one_map) for one_map in maps])
    screen.print(f"Which tokens were kept, merged and dropped: {files[0]} and {files[1]}")


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


def _score_cells(rows: dict[str, dict[str, Any]], questions: int) -> Cells:
    columns = ("", "accuracy, interval", "ex/s", "MB", "GFLOPs", "image tokens by layer")
    cells = []
    for name, row in rows.items():
        metric, report = row["metric"], row["report"]
        interval = f"({metric['accuracy_low']:.1f}-{metric['accuracy_high']:.1f})"
        cells.append(
            (
                name,
                f"{metric['accuracy']:.1f} {interval}",
                f"{row['per_second']:.0f}",
                f"{row['memory'] / 2**20:.0f}",
                f"{2 * report.macs / 1e9:.2f}",
                " ".join(str(image) for _, image in report.lengths[1:]),
            )
        )
    title = f"Shipped ViLT, {questions} questions about unseen images"
    return Cells(title, columns, tuple(cells))


def _table(cells: Cells, no_wrap: bool = False) -> Table:
    """A table for the terminal; without wrapping it is set tighter, too."""
    padding = 0 if no_wrap else (0, 1)
    table = Table(title=cells.title, box=box.SIMPLE, padding=padding)
    for name in cells.columns:
        table.add_column(name, justify="left" if not name else "right", no_wrap=no_wrap)
    for row in cells.rows:
        table.add_row(*row)
    return table


def _photograph_cells() -> Cells:
    """Time a full-size ViLT-B/32 with random weights on the shipped photographs and their
    captions."""
    from transformers import AutoTokenizer, ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    model = ViltForQuestionAnswering(ViltConfig(num_labels=3129)).eval()
    rows = json.loads((SHIPPED / "photos" / "photos.json").read_text())
    transform = KeepAspect(384)
    images = [transform(open_image(SHIPPED / "photos" / row["file"])) for row in rows]
    text = TextTransform(AutoTokenizer.from_pretrained(SHIPPED / BASE), 40, padding="max_length")
    batch = text([row["caption"] for row in rows], [row["file"] for row in rows])
    batch["pixel_values"], batch["pixel_mask"] = pad_images(images)
    variants: dict[str, Reducer | None] = {
        "stock transformers": None,
        "fused, not reduced": pumer.Unreduced(),
        "PuMer (vilt-vqav2)": PRESETS["vilt-vqav2"],
    }
    calls = {name: partial(_as, model, reducer, batch) for name, reducer in variants.items()}
    timings = alternate(calls, runs=_PHOTOGRAPH_RUNS, warmup=1)
    stock = timings["stock transformers"].median
    cells = []
    for name, call in calls.items():
        median, memory = timings[name].median, peak_activations(call)
        per_second, speed = f"{len(rows) / median:.2f}", f"{stock / median:.2f}"
        cells.append((name, per_second, speed, f"{memory / 2**20:.0f}"))
    title = (
        f"ViLT-B/32 (random weights), {len(rows)} photographs of different shapes, 40 text tokens"
    )
    return Cells(title, ("", "examples/s", "x stock", "memory MB"), tuple(cells))


def _as(model: Any, reducer: Reducer | None, batch: dict[str, torch.Tensor]) -> Any:
    pumer.remove(model) if reducer is None else pumer.apply(model, reducer)
    return _forward(model, batch)


def _token_maps(
    model_name: str, task: Scenes, num_maps: int = 6
) -> list[tuple[TokenMap, Image.Image, str]]:
    """Token map, image and title of the first few questions."""
    model = open_model(model_name, None)
    collator = open_task(model_name, model, {"name": "scenes"})
    return [show(model, collator, example) for example in task.examples("test")[: 2 * num_maps : 2]]


def _write(out: Path, page: str, drawings: Sequence[Image.Image]) -> tuple[Path, Path]:
    """Write the drawings below each other as one PNG, and the page."""
    width, height = max(d.width for d in drawings), sum(d.height for d in drawings)
    sheet = Image.new("RGB", (width, height), "white")
    y = 0
    for drawing in drawings:
        sheet.paste(drawing, (0, y))
        y += drawing.height
    files = out / "tokens.png", out / "tokens.html"
    with replacing(files[0], "wb") as file:
        sheet.save(file, "PNG")
    with replacing(files[1]) as file:
        file.write(page)
    return files
