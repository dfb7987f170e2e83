"""Stock, fused and reduced models side by side.

Three kinds of variant: stock transformers; the same model with fused kernels and trimmed padding
but nothing reduced ("fused"); and each reducer on top of that. Only the comparison with "fused"
measures token reduction itself. Where transformers lacks a model, such as METER, ours is measured
as stock and the row says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pumer.api import active, apply
from pumer.costs.report import last_forward_macs, report
from pumer.lab.bench import models, records
from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.overhead import overhead_share
from pumer.lab.bench.results import Bench, Row
from pumer.lab.bench.settings import BenchSettings, resolve_device
from pumer.lab.bench.timing import Timing, alternate
from pumer.lab.progress import Progress, no_progress
from pumer.presets import ReducerSpec, read_reducer
from pumer.reducers import Reducer, Unreduced

STOCK, FUSED, PACKED = "stock", "fused", ", packed"
REAL_TEXT = (8, 16)
"""Fewest and most real text tokens of an example; the others are padding."""


def bench(
    settings: BenchSettings,
    *,
    warmup: int = 2,
    memory: bool = True,
    overhead: bool = True,
    progress: Progress = no_progress,
) -> Bench:
    """Measure stock transformers, the fused but unreduced model, and each reducer: speed, memory
    and overhead.

    Args:
        settings: what to measure, where, and how often.
        warmup: untimed forwards of each variant, at least one.
        memory: measure peak activation memory; not for compiled code on a CPU, whose operators
            cannot be tracked.
        overhead: measure the cost of selecting and reducing tokens, in separate forwards; not for
            compiled code.
        progress: called with 1 after every round of forwards.

    Returns:
        The rows; without the requested device, rows that say "not measured".

    Raises:
        ValueError: for unknown names and settings that do not fit.

    >>> result = bench(BenchSettings("vilt-tiny", ["tome"], batch=2, text=20, runs=1), warmup=1)
    >>> [row.variant for row in result.rows]
    ['stock', 'fused', 'tome']
    """
    model = settings.model
    named = name_reducers(models.default_reducers(model), settings.reducers)
    size = models.image_size(model) if settings.image_size is None else settings.image_size
    device, is_there = resolve_device(settings.device)
    columns = _columns(settings, size, device)
    with using_threads(settings.threads):
        if not is_there:
            missing = (
                Row(name, note="not measured, no CUDA device") for name in (STOCK, FUSED, *named)
            )
            return Bench(columns, records.environment(), tuple(missing))
        net = models.build(model).to(device, getattr(torch, settings.dtype))
        data = models.inputs(
            net, settings.batch, size, settings.text, REAL_TEXT, busier=settings.pack
        )
        nets = variants(net, named, settings.pack)
        calls = {
            name: forward(torch.compile(variant) if settings.compiled else variant, data)
            for name, variant in nets.items()
        }
        timings = alternate(calls, settings.runs, max(warmup, 1), device, progress)
        # Now: the watched forwards below may have other lengths.
        macs = _macs(nets, data)
        watched = calls if memory and not (settings.compiled and device == "cpu") else {}
        peaks = {name: peak_activations(call, device) for name, call in watched.items()}
        shares = {
            name: overhead_share(nets[name], calls[name], device)
            for name in (nets if overhead and not settings.compiled else ())
            if name.removesuffix(PACKED) not in (STOCK, FUSED)
        }
        notes = {STOCK: models.stock_note(model)}
        rows = _rows(settings.batch, macs, timings, peaks, shares, notes)
        return Bench(columns, records.environment(device), rows, weight_bytes(net))


def _columns(settings: BenchSettings, image_size: int, device: str) -> dict[str, Any]:
    """The settings as the rows have them."""
    return {
        "model": settings.model,
        "batch": settings.batch,
        "image_size": image_size,
        "text": settings.text,
        "real_text": "-".join(map(str, REAL_TEXT)),
        "device": device,
        "dtype": settings.dtype,
        "mode": "compiled" if settings.compiled else "eager",
        "runs": settings.runs,
    }


def name_reducers(
    defaults: Sequence[ReducerSpec], specs: Sequence[ReducerSpec | None] | None = None
) -> dict[str, Reducer]:
    """Reducers by their names in a table; the defaults if none are given.

    Raises:
        ValueError: for unknown reducers, and for the same one twice.
    """
    named: dict[str, Reducer] = {}
    for spec in defaults if specs is None else specs:
        if spec is None:
            continue
        reducer = read_reducer(spec)
        if isinstance(spec, str):
            name = spec
        else:
            settings = spec if isinstance(spec, Mapping) else reducer.settings()
            options = {key: value for key, value in settings.items() if key != "reducer"}
            name = (
                f"{reducer.name}({', '.join(f'{key}={value}' for key, value in options.items())})"
            )
        if name in (STOCK, FUSED, *named):
            raise ValueError(f"{name} is measured already: name every reducer once")
        named[name] = reducer
    return named


def variants(
    net: nn.Module, reducers: dict[str, Reducer], pack: bool = False
) -> dict[str, nn.Module]:
    """The stock model, fused, and with each reducer, sharing one set of weights; with `pack`, all
    but stock with packed rows too."""
    nets = {STOCK: net}
    for name, reducer in {FUSED: Unreduced(), **reducers}.items():
        nets[name] = twin(net, reducer)
        if pack:
            nets[f"{name}{PACKED}"] = twin(net, reducer, pack=True)
    return nets


def twin(net: nn.Module, reducer: Reducer, pack: bool = False) -> nn.Module:
    """The same model with a reducer, sharing its weights."""
    weights = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return apply(copy.deepcopy(net, weights), reducer, pack=pack)


def forward(net: Callable[..., Any], data: dict[str, Tensor]) -> Callable[[], Any]:
    """A forward without gradients, as a call without arguments."""

    def call() -> Any:
        with torch.inference_mode():
            return net(**data)

    return call


def first_rows(inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of a batch; raises ValueError for inputs that are not one row per example."""
    batch = len(inputs["input_ids"])
    odd = [name for name, value in inputs.items() if torch.is_tensor(value) and len(value) != batch]
    if odd:
        raise ValueError(
            f"{' and '.join(odd)} of this model {'are' if odd[1:] else 'is'} not a row per "
            "example, as other models have it, so that a part of a batch cannot be measured"
        )
    return {
        name: value[:rows] if torch.is_tensor(value) else value for name, value in inputs.items()
    }


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads inside the with block; None keeps its own choice."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _macs(nets: dict[str, nn.Module], data: dict[str, Tensor]) -> dict[str, int]:
    """MACs per example of the forwards that were just timed."""
    patch = active(nets[FUSED])
    assert patch is not None
    assert patch.entry is not None
    # Stock ViLT also trims padded images to the longest of the batch, but never the text.
    stock = report(nets[STOCK], data["input_ids"].shape[1], patch.entry[1]).macs
    return {
        STOCK: stock,
        **{name: last_forward_macs(variant) for name, variant in nets.items() if name != STOCK},
    }


def _rows(
    batch: int,
    macs: dict[str, int],
    timings: dict[str, Timing],
    peaks: dict[str, int],
    shares: dict[str, float],
    notes: dict[str, str],
) -> tuple[Row, ...]:
    rows = []
    for name, timing in timings.items():
        x_fused, ratio = timings[FUSED].median / timing.median, macs[FUSED] / macs[name]
        rows.append(
            Row(
                variant=name,
                timing=timing,
                per_second=batch / timing.median,
                x_stock=timings[STOCK].median / timing.median,
                x_fused=x_fused,
                macs=macs[name],
                flops_ratio=ratio,
                flops_share=None if name in (STOCK, FUSED) else x_fused / ratio,
                peak_bytes=peaks.get(name),
                memory_share=peaks[name] / peaks[STOCK] if peaks else None,
                overhead=shares.get(name),
                note=notes.get(name, ""),
            )
        )
    return tuple(rows)
