"""Comparable times of several variants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pumer.lab.progress import Progress, no_progress


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one variant, in order.

    >>> Timing((1.0, 3.0, 2.0)).median
    2.0
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        """20th percentile, in seconds."""
        return self._percentile(0.2)

    @property
    def p80(self) -> float:
        """80th percentile, in seconds."""
        return self._percentile(0.8)

    def _percentile(self, share: float) -> float:
        position = share * (len(self.seconds) - 1)
        low, ordered = int(position), sorted(self.seconds)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    runs: int = 9,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Timing]:
    """Time variants alternately in one process, so that disturbances affect all of them.

    Every other round runs in reverse order, so that no variant always follows the same one. On CUDA
    the device is synchronized before and after every call.

    Args:
        variants: name -> the call to time.
        runs: timed calls of each.
        warmup: untimed calls of each before those.
        device: where the calls compute.
        progress: called with 1 after every round.

    >>> timings = alternate({"a": lambda: None, "b": lambda: None}, runs=3)
    >>> len(timings["a"].seconds)
    3
    """
    if runs < 1 or warmup < 0:
        raise ValueError(
            f"a measurement takes 1 run or more and 0 warm-up rounds or more, not {runs} and "
            f"{warmup}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(warmup + runs):
        for name in list(variants)[:: -1 if round_index % 2 else 1]:
            took = clock(variants[name], device)
            if round_index >= warmup:
                seconds[name].append(took)
        progress(1)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def clock(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device | str) -> None:
    """Synchronize with a CUDA device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
