"""`pumer bench`, `pumer bench llm`, `pumer bench train` and `pumer bench where`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.progress import Progress

from pumer._options import Count, OutputFile
from pumer._rows import RowFile
from pumer._terminal import visible
from pumer.lab.bench import llm_results, results, training
from pumer.lab.bench.llm import Attention, bench_llm
from pumer.lab.bench.run import Device, Dtype, bench
from pumer.lab.bench.training import bench_training
from pumer.lab.bench.where import where
from pumer.lab.commands.common import ReducerSettings


def bench_(
    model: str = "vilt-b32",
    reducers: list[ReducerSettings] | None = None,
    batch: Count = 8,
    image_size: Count | None = None,
    text: Count = 40,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compiled: bool = False,
    threads: Count | None = None,
    runs: Count = 9,
    record: OutputFile | None = None,
) -> None:
    """Time stock transformers, the fused but unreduced model and reduced ones, taking turns in one
    process.

    Args:
        model: a model of random weights and true architecture: vilt-b32 or meter-base.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's
            presets for VQAv2 if not given.
        batch: examples at a time.
        image_size: side of the pictures in pixels; the model's own if not given.
        text: text tokens, padding included; 8 to 16 of them are real.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        compiled: measure under torch.compile.
        threads: CPU threads; torch's own choice if not given.
        runs: timed forwards of each.
        record: CSV file to add the rows to.
    """
    _measure(
        bench,
        RowFile(record, results.COLUMNS),
        rounds=runs + 2,
        model=model,
        reducers=reducers,
        batch=batch,
        image_size=image_size,
        text=text,
        device=device,
        dtype=dtype,
        compiled=compiled,
        threads=threads,
        runs=runs,
    )


def llm_(
    model: str = "llava-1.5-7b-shape",
    reducers: list[ReducerSettings] | None = None,
    layers: Count | None = 4,
    tower_layers: Count | None = 4,
    batch: Count = 1,
    text: Count = 64,
    new_tokens: Count = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    threads: Count | None = None,
    runs: Count = 5,
    record: OutputFile | None = None,
) -> None:
    """Time a stock vision-language model and reduced ones, taking turns in one process, as they
    write an answer.

    Args:
        model: a model of random weights, true architecture and true widths: llava-1.5-7b-shape,
            llava-next-7b-shape, qwen2.5-vl-7b-shape or internvl3-8b-shape.
        reducers: reducers' names, or `{"reducer": ..., setting: value}`; visionzip, fastv and pumer
            if not given.
        layers: of the language model, 2 or more; null for the true number.
        tower_layers: of the vision tower, 2 or more; null for the true number.
        batch: prompts at a time, each with one picture.
        text: text tokens of a prompt.
        new_tokens: tokens of the answer.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        attention: kernel of the language model and of the vision tower.
        threads: CPU threads; torch's own choice if not given.
        runs: timed answers of each.
        record: CSV file to add the rows to.
    """
    _measure(
        bench_llm,
        RowFile(record, llm_results.COLUMNS),
        rounds=runs + 1,
        model=model,
        reducers=reducers,
        layers=layers,
        tower_layers=tower_layers,
        batch=batch,
        text=text,
        new_tokens=new_tokens,
        device=device,
        dtype=dtype,
        attention=attention,
        threads=threads,
        runs=runs,
    )


def train_(
    model: str = "vilt-b32",
    reducers: list[ReducerSettings] | None = None,
    batch: Count = 4,
    teachers: list[bool] | None = None,
    text: Count = 40,
    device: Device = "auto",
    threads: Count | None = None,
    runs: Count = 5,
    record: OutputFile | None = None,
) -> None:
    """Time steps of training, unreduced and reduced, with and without a teacher, taking turns in
    one process.

    Args:
        model: a model of random weights and true architecture: vilt-b32 or meter-base.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's
            presets for VQAv2 if not given.
        batch: examples at a time.
        teachers: `[false]`, `[true]` or both; both if not given.
        text: text tokens, padding included; 8 to 16 of them are real.
        device: "auto" takes a CUDA device if there is one.
        threads: CPU threads; torch's own choice if not given.
        runs: timed steps of each.
        record: CSV file to add the rows to.
    """
    _measure(
        bench_training,
        RowFile(record, training.COLUMNS),
        rounds=runs + 1,
        model=model,
        reducers=reducers,
        batch=batch,
        teachers=teachers or (False, True),
        text=text,
        device=device,
        threads=threads,
        runs=runs,
    )


def where_(
    model: str = "vilt-b32",
    reducer: ReducerSettings = None,
    batches: list[Count] | None = None,
    image_sizes: list[Count] | None = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Count | None = None,
    runs: Count = 5,
    record: OutputFile | None = None,
) -> None:
    """Show where token reduction pays on this machine: batch size against picture size.

    Args:
        model: a model of random weights and true architecture: vilt-b32 or meter-base.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; the model's
            first preset for VQAv2 if not given.
        batches: numbers of examples at a time; 1, 4 and 16 if not given.
        image_sizes: sides of the pictures in pixels; 192, 384 and 576 if not given.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        threads: CPU threads; torch's own choice if not given.
        runs: timed forwards of each.
        record: CSV file to add the rows to.
    """
    rows = RowFile(record, results.COLUMNS)
    measured = where(
        model=model,
        reducer=reducer,
        batches=batches or (1, 4, 16),
        image_sizes=image_sizes or (192, 384, 576),
        device=device,
        dtype=dtype,
        threads=threads,
        runs=runs,
    )
    print(visible(str(measured)))
    rows.append(measured.records())


def _measure(
    bench: Callable[..., Any],
    rows: RowFile,
    rounds: int,
    reducers: list[ReducerSettings] | None,
    **settings: Any,
) -> None:
    """Print what a bench measures, with a bar of its rounds, then add it to the rows of a file."""
    wanted = None if reducers is None else [spec for spec in reducers if spec is not None]
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=rounds)
        result = bench(reducers=wanted, progress=lambda: progress.advance(bar), **settings)
    print(visible(str(result)))
    rows.append(result.records())
