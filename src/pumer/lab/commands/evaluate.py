"""`pumer eval` and `pumer predict`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pumer
from pumer._extras import need
from pumer._options import Count, OutputFile
from pumer._rows import RowFile
from pumer._terminal import console
from pumer.lab.bench.records import environment
from pumer.lab.bench.settings import Device, ReducerSettings
from pumer.lab.commands.common import open_model, open_task, print_metrics
from pumer.lab.evaluate import Result, evaluate, predict, take, write_samples
from pumer.lab.score.ray import Cluster, Engine, predict_on_ray
from pumer.lab.tasks.base import Blind, Example, Task
from pumer.reducers import to_dict

COLUMNS = (
    "model",
    "reducer",
    "task",
    "split",
    "examples",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "details",
    "batch_size",
    *environment(),
)
"""Columns of the rows that `pumer eval` records."""


def evaluate_(
    model: str,
    task: str | dict[str, Any] = "scenes",
    split: str = "test",
    reducer: ReducerSettings = None,
    batch_size: Count = 32,
    limit: Count | None = None,
    device: Device = "auto",
    blind: Blind = None,
    samples: OutputFile | None = None,
    record: OutputFile | None = None,
) -> None:
    """Score a model on a task; `constant` is the accuracy of the best constant answer.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name (`pumer list`); its settings are given as --task.root DIR.
        split: split of its data.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings are given as --reducer.SETTING VALUE; the model's own if not given.
        batch_size: examples at a time.
        limit: only the first so many examples.
        device: "auto" takes a CUDA device if there is one.
        blind: show the model only the "text", with grey images, or only the "image", with the text
            "a picture": what it still gets right needs no image, or no question. A fair baseline is
            a model that was also trained with this option.
        samples: file to write with one JSON line per example.
        record: CSV file to add a row to, with settings, machine and versions.
    """
    rows = RowFile(record, COLUMNS)
    net = open_model(model, reducer, device)
    collator = replace(open_task(model, net, task), blind=blind)
    examples = collator.task.examples(split)
    examples = take(examples, range(len(examples))[:limit])
    result = evaluate(net, examples, collator, batch_size=batch_size, show_progress=True)
    shown = f", {blind} alone" if blind else ""
    print_metrics(
        f"{model} on {collator.task.name} {split}{shown}: {result.examples} examples",
        {**result.metric, "examples/s": round(result.per_second, 1)},
    )
    rows.append([_row(model, net, task, split, batch_size, blind, result)])
    if samples:
        write_samples(samples, result, examples, collator)


def predict_(
    model: str,
    task: str | dict[str, Any],
    out: OutputFile,
    split: str = "test2015",
    reducer: ReducerSettings = None,
    batch_size: Count = 32,
    device: Device = "auto",
    engine: Engine = "plain",
    workers: Count | None = None,
    address: str | None = None,
) -> None:
    """Write the prediction file for a task's evaluation server; broken images are reported and
    skipped.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name (`pumer list`); its settings are given as --task.root DIR.
        out: file to write.
        split: split of its data.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings are given as --reducer.SETTING VALUE; the model's own if not given.
        batch_size: examples at a time.
        device: "auto" takes a CUDA device if there is one.
        engine: "ray" distributes the work over a Ray cluster.
        workers: Ray workers; the cluster's GPUs, or 2, if not given.
        address: address of a Ray cluster; one is started on this machine if not given.
    """
    if engine == "ray":
        need("the engine ray", "ray", "ray")
    net = open_model(model, reducer, device)
    collator = open_task(model, net, task)
    examples = collator.task.examples(split)
    if engine == "ray":
        result = predict_on_ray(
            net, examples, collator, Cluster(workers, address), batch_size=batch_size
        )
    else:
        result = predict(
            net, examples, collator, batch_size=batch_size, skip_broken=True, show_progress=True
        )
    done = [
        example
        for example in (examples[i] for i in range(len(examples)))
        if example.id in result.predictions
    ]
    written = _write(collator.task, out, result, done)
    screen = console()
    for broken_id, reason in result.broken.items():
        screen.print(f"left out {json.dumps(broken_id)}: {reason}", style="yellow", markup=False)
    screen.print(
        f"{len(done)} predictions in {written}, {len(result.broken)} examples left out for broken "
        "images"
    )


def _write(task: Task, out: str, result: Result, done: list[Example]) -> str:
    """Write predictions to a file, or to a temporary one if that has become impossible; returns
    which."""
    try:
        task.write_predictions(out, result.predictions, done)
    except OSError as error:
        instead = Path(tempfile.mkdtemp(prefix="pumer-"), Path(out).name)
        task.write_predictions(instead, result.predictions, done)
        raise OSError(
            f"{out} cannot be written ({error.strerror}): the predictions are in {instead}"
        ) from error
    return out


def _row(
    model: str,
    net: Any,
    task: str | dict[str, Any],
    split: str,
    batch_size: int,
    blind: Blind,
    result: Result,
) -> dict[str, Any]:
    patch = pumer.active(net)
    metric = {name: result.metric[name] for name in ("accuracy", "accuracy_low", "accuracy_high")}
    details = {name: value for name, value in result.metric.items() if name not in metric}
    return {
        "model": model,
        "reducer": json.dumps(to_dict(patch.reducer)) if patch else "",
        "task": json.dumps(task),
        "split": split,
        "examples": result.examples,
        **metric,
        "details": json.dumps(details | ({"blind": blind} if blind else {})),
        "batch_size": batch_size,
        **environment(net.device),
    }
