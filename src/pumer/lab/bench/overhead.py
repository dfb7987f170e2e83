"""What choosing and reducing tokens costs by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pumer.adapters.encoder import reduce as encoder
from pumer.lab.bench.timing import clock, wait


def overhead_share(
    model: nn.Module, call: Callable[[], Any], device: torch.device | str = "cpu", runs: int = 5
) -> float:
    """Share of a forward that goes into the reducer's plan and into applying it: the median over
    `runs` forwards.

    Taken in forwards of their own, around every call of the step that an adapter reduces in, since
    looking at the clock takes time too, on CUDA above all, where the device is waited for each
    time.

    Args:
        model: a reduced model.
        call: one forward of it.
        device: where it computes.
        runs: forwards to take the median of.
    """
    shares = []
    with _stopwatch(device) as spent:
        for _ in range(runs):
            spent.clear()
            total_seconds = clock(call, device)
            shares.append(sum(spent) / total_seconds)
    return statistics.median(shares)


@contextmanager
def _stopwatch(device: torch.device | str) -> Iterator[list[float]]:
    """Seconds of every reduction of the forwards inside the with block."""
    reduce, spent = encoder.reduce, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait(device)
        start = time.perf_counter()
        result = reduce(*args, **kwargs)
        wait(device)
        spent.append(time.perf_counter() - start)
        return result

    encoder.reduce = timed  # type: ignore[assignment]
    try:
        yield spent
    finally:
        encoder.reduce = reduce
