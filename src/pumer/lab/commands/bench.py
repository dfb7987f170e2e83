"""`pumer bench`, `pumer bench llm`, `pumer bench train` and `pumer bench where`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.progress import Progress

from pumer._options import OutputFile
from pumer._rows import RowFile
from pumer._terminal import visible
from pumer.lab.bench import llm_results, results, training
from pumer.lab.bench.llm import bench_llm
from pumer.lab.bench.run import bench
from pumer.lab.bench.settings import (
    AnswerBenchSettings,
    BenchSettings,
    SweepSettings,
    TrainingBenchSettings,
)
from pumer.lab.bench.sweep import sweep
from pumer.lab.bench.training import bench_training


def bench_(settings: BenchSettings, record: OutputFile | None = None) -> None:
    """Time stock transformers, the fused but unreduced model and reduced ones, alternating in one
    process.

    Args:
        settings: what to measure, where, and how often.
        record: CSV file to add the rows to.
    """
    _run(bench, settings, RowFile(record, results.COLUMNS), rounds=settings.runs + 2)


def llm_(settings: AnswerBenchSettings, record: OutputFile | None = None) -> None:
    """Time the answers of a stock vision-language model and of reduced ones, alternating in one
    process.

    Args:
        settings: what to measure, where, and how often.
        record: CSV file to add the rows to.
    """
    _run(bench_llm, settings, RowFile(record, llm_results.COLUMNS), rounds=settings.runs + 1)


def train_(settings: TrainingBenchSettings, record: OutputFile | None = None) -> None:
    """Time training steps, unreduced and reduced, with and without a teacher, alternating in one
    process.

    Args:
        settings: what to measure, where, and how often.
        record: CSV file to add the rows to.
    """
    _run(bench_training, settings, RowFile(record, training.COLUMNS), rounds=settings.runs + 1)


def where_(settings: SweepSettings, record: OutputFile | None = None) -> None:
    """Show where token reduction pays on this machine: batch size against image size.

    Args:
        settings: what to measure, where, and how often.
        record: CSV file to add the rows to.
    """
    cells = len(settings.batches or (1, 4, 16)) * len(settings.image_sizes or (192, 384, 576))
    _run(sweep, settings, RowFile(record, results.COLUMNS), rounds=cells)


def _run(measure: Callable[..., Any], settings: Any, rows: RowFile, rounds: int) -> None:
    """Print what a bench measures, with a bar of its rounds, then add it to the rows of a file."""
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring", total=rounds)
        measured = measure(settings, progress=lambda done: bar.advance(task, done))
    print(visible(str(measured)))
    rows.append(measured.records())
