"""Shared by commands: opening models, building tasks, printing metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import pumer
from pumer._terminal import console
from pumer.hub import is_stock, load, load_stock
from pumer.hub.sources import CONFIG, PROCESSING, find_source
from pumer.lab.bench.settings import Device, ReducerSettings
from pumer.lab.tasks import build
from pumer.lab.tasks.base import Collator
from pumer.lab.tasks.processors import saved_collator
from pumer.lab.tasks.prompts import vocabulary
from pumer.presets import read_reducer


def pick_device(device: Device) -> str:
    """The device that is meant; raises ValueError for CUDA if there is none."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError(
            "there is no CUDA device here, or this torch cannot use it: leave --device out"
        )
    return device if device != "auto" else "cuda" if there else "cpu"


def open_model(model: str, reducer: ReducerSettings, device: Device = "cpu") -> PreTrainedModel:
    """A saved model with its own reducer, or with `reducer` if given.

    Decoders may also be stock models of transformers, in a folder or on the Hub.
    """
    resolved_device = pick_device(device)
    # Shipped in half precision, which CPUs are slow at.
    dtype = torch.float32 if resolved_device == "cpu" else None
    if is_stock(model):
        net = load_stock(model, dtype, resolved_device)
    else:
        net = load(model, dtype or torch.float32, resolved_device)
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
    console().print(table)


def open_task(model: str, net: PreTrainedModel, task: str | dict[str, Any]) -> Collator:
    """A task's collator with the labels, tokenizer and image transform or processor of a model."""
    settings = {"name": task} if isinstance(task, str) else task
    source = model if is_stock(model) else str(find_source(model, (CONFIG, *PROCESSING)).folder)
    return saved_collator(source, net, build(settings, vocabulary(net)))
