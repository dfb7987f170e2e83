"""What several commands need: a model folder opened, a task built, a reducer read from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

import pumer
from pumer.bench.run import Device
from pumer.data.transforms import load_transform
from pumer.hub import load
from pumer.presets import model_folder, read_reducer
from pumer.tasks import build
from pumer.tasks.base import Collator
from pumer.tasks.prompts import collator_for, vocabulary

ReducerSettings = str | dict[str, Any] | None


def open_model(model: str, reducer: ReducerSettings, device: Device = "cpu") -> PreTrainedModel:
    """A saved model with its own reduction in force, or with another one where `reducer` is given."""
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # Shipped in half precision, which CPUs are slow at.
    net = load(model_folder(model), dtype=torch.float32, device=place)
    if reducer is not None:
        pumer.apply(net, read_reducer(reducer))
    return net.eval()


def print_metrics(title: str, values: Mapping[str, float]) -> None:
    """A table of metrics on the console."""
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


def open_task(model: str, net: PreTrainedModel, task: str | dict[str, Any]) -> Collator:
    """A task with the labels, the tokenizer and the image transform of a model; texts are cut as in its training."""
    folder = model_folder(model)
    settings = {"name": task} if isinstance(task, str) else task
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return collator_for(net, build(settings, vocabulary(net)), tokenizer, load_transform(folder))
