"""What a reduction costs by itself: choosing and reducing tokens, as a share of a forward.

A patch enters its `timer` around every part of a forward that it adds. Timing waits for the device
at each of them, so it has forwards of its own, apart from those whose speed is measured.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pumer.api import active
from pumer.lab.bench.timing import clock, wait


class Stopwatch:
    """Seconds of every part of a forward, summed over its calls.

    Args:
        device: where the model computes; it is waited for before and after each call.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}

    def start(self, part: str) -> None:
        """A part begins."""
        wait(self.device)
        self._started[part] = time.perf_counter()

    def stop(self, part: str) -> None:
        """A part ends."""
        wait(self.device)
        self.seconds[part] += time.perf_counter() - self._started.pop(part)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what the with block does as a part."""
        self.start(part)
        try:
            yield
        finally:
            self.stop(part)


def overhead_share(
    model: nn.Module, call: Callable[[], Any], device: torch.device | str = "cpu", runs: int = 5
) -> float:
    """Share of a forward spent on the reducer's plan and on applying it, in encoders and vision
    towers: the median over `runs` forwards; 0 for an unpatched model.

    Args:
        model: a reduced model.
        call: one forward of it.
        device: where it computes.
        runs: forwards to take the median of.
    """
    shares = []
    for _ in range(runs):
        with _timer(model, device) as watch:
            total_seconds = clock(call, device)
        shares.append(watch.seconds["encoder"] / total_seconds)
    return statistics.median(shares)


@dataclass(frozen=True)
class PrefillShares:
    """Shares of a prefill's time.

    Args:
        tower: of the vision tower.
        selection: of choosing and reducing: everything that `pumer.apply` adds outside the vision
            tower.
    """

    tower: float
    selection: float


def prefill_shares(
    model: nn.Module, call: Callable[[], Any], device: torch.device | str = "cpu", runs: int = 3
) -> PrefillShares:
    """Where the time of a decoder's prefill goes: medians over `runs` prefills.

    Args:
        model: a reduced decoder.
        call: one prefill of it.
        device: where it computes.
        runs: prefills to take the median of.
    """
    patch = active(model)
    assert patch is not None
    adapter: Any = patch.adapter
    vision: nn.Module = adapter.vision(model)
    shares = []
    for _ in range(runs):
        with _timer(model, device) as watch, _timed_module(vision, "tower", watch):
            total_seconds = clock(call, device)
        parts = (watch.seconds[part] / total_seconds for part in ("tower", "decoder"))
        shares.append(tuple(parts))
    tower, selection = map(statistics.median, zip(*shares, strict=True))
    return PrefillShares(tower, selection)


@contextmanager
def _timer(model: nn.Module, device: torch.device | str) -> Iterator[Stopwatch]:
    """A stopwatch as the timer of the model's patch, inside the with block."""
    watch, patch = Stopwatch(device), active(model)
    if patch is None:
        yield watch
        return
    before, patch.timer = patch.timer, watch
    try:
        yield watch
    finally:
        patch.timer = before


@contextmanager
def _timed_module(module: nn.Module, part: str, watch: Stopwatch) -> Iterator[None]:
    """Time a module's forwards as a part, inside the with block."""
    before = module.register_forward_pre_hook(lambda *_: watch.start(part))
    after = module.register_forward_hook(lambda *_: watch.stop(part))
    try:
        yield
    finally:
        before.remove()
        after.remove()
