"""`pumer eval` and `pumer predict`."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pumer.commands.common import ReducerSettings, open_model, open_task
from pumer.evaluate import evaluate, predict, write_samples


def evaluate_(
    model: str,
    task: str | dict[str, Any] = "scenes",
    split: str = "test",
    reducer: ReducerSettings = None,
    batch_size: int = 32,
    limit: int | None = None,
    samples: str | None = None,
) -> None:
    """Score a model on a task.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name, or `{"name": ..., "root": ..., ...}`.
        split: which part of its data.
        reducer: a preset, a reducer's name, or `{"reducer": ..., setting: value}`; the model's own if not given.
        batch_size: examples at a time.
        limit: only the first so many examples.
        samples: file to write with one JSON line per example.
    """
    net = open_model(model, reducer)
    collator = open_task(model, net, task)
    examples = collator.task.examples(split)[:limit]
    result = evaluate(net, examples, collator, batch_size=batch_size, progress=True)
    if samples:
        write_samples(samples, result, examples, collator)
    table = Table(title=f"{model} on {collator.task.name} {split}: {result.examples} examples")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in {**result.metric, "examples/s": round(result.per_second, 1)}.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


def predict_(
    model: str,
    task: str | dict[str, Any],
    out: str,
    split: str = "test2015",
    reducer: ReducerSettings = None,
    batch_size: int = 32,
) -> None:
    """Write the prediction file that a task's evaluation server takes; broken images are reported and left out.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name, or `{"name": ..., "root": ..., ...}`.
        out: file to write.
        split: which part of its data.
        reducer: a preset, a reducer's name, or `{"reducer": ..., setting: value}`; the model's own if not given.
        batch_size: examples at a time.
    """
    net = open_model(model, reducer)
    collator = open_task(model, net, task)
    examples = collator.task.examples(split)
    result = predict(net, examples, collator, batch_size=batch_size, skip_broken=True, progress=True)
    done = [example for example in (examples[i] for i in range(len(examples))) if example.id in result.predictions]
    collator.task.write_predictions(out, result.predictions, done)
    console = Console()
    for number, reason in result.broken.items():
        console.print(f"left out {json.dumps(number)}: {reason}", style="yellow", markup=False)
    console.print(f"{len(done)} predictions in {out}, {len(result.broken)} examples left out for broken images")
