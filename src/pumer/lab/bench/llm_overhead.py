"""Where the time of a reduced decoder's prefill goes: vision tower, choosing and reducing, and the
rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pumer.adapters.decoder import output as decoder_output
from pumer.adapters.decoder import prefill
from pumer.api import active
from pumer.lab.bench.timing import clock, wait


@dataclass(frozen=True)
class Shares:
    """Shares of a prefill's time.

    Args:
        tower: of the vision tower.
        selection: of choosing and reducing: all that `pumer.apply` adds, which is what it makes of
            the vision tower's and the prompt's tensors, and what its hooks do around the decoder's
            layers.
    """

    tower: float
    selection: float


def prefill_shares(
    model: nn.Module, call: Callable[[], Any], device: torch.device | str = "cpu", runs: int = 3
) -> Shares:
    """Where a prefill's time goes: medians over `runs` prefills.

    Taken in prefills of their own, since looking at the clock takes time too, on CUDA above all,
    where the device is waited for each time.

    Args:
        model: a reduced decoder.
        call: one prefill of it.
        device: where it computes.
        runs: prefills to take the median of.
    """
    shares = []
    for _ in range(runs):
        with _watched(model, device) as watch:
            total_seconds = clock(call, device)
        shares.append((watch.tower / total_seconds, watch.selection / total_seconds))
    tower, selection = map(statistics.median, zip(*shares, strict=True))
    return Shares(tower, selection)


@dataclass
class _Stopwatch:
    """Seconds in each part of a prefill."""

    device: torch.device | str
    tower: float = 0.0
    selection: float = 0.0
    began: float = 0.0

    def start(self, *_: Any) -> None:
        wait(self.device)
        self.began = time.perf_counter()

    def stop_tower(self, *_: Any) -> None:
        wait(self.device)
        self.tower += time.perf_counter() - self.began

    def stop_selection(self, *_: Any) -> None:
        wait(self.device)
        self.selection += time.perf_counter() - self.began

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as selection."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = function(*args, **kwargs)
            self.stop_selection()
            return result

        return timed


@contextmanager
def _watched(model: nn.Module, device: torch.device | str) -> Iterator[_Stopwatch]:
    """Clock the parts of the prefills inside the with block."""
    patch = active(model)
    assert patch is not None
    adapter: Any = patch.adapter
    language, vision = adapter.language(model), adapter.vision(model)
    watch = _Stopwatch(device)
    parts = [(prefill, "begin_prefill"), (decoder_output, "finish")]
    with ExitStack() as undo:
        hooks = [
            vision.register_forward_pre_hook(watch.start),
            vision.register_forward_hook(watch.stop_tower),
        ]
        # Hooks run in order: one before and one behind those that reduce.
        hooks += [
            layer.register_forward_pre_hook(watch.start, prepend=True) for layer in language.layers
        ]
        hooks += [
            layer.register_forward_pre_hook(watch.stop_selection) for layer in language.layers
        ]
        for hook in hooks:
            undo.callback(hook.remove)
        for module, name in parts:
            function = getattr(module, name)
            undo.callback(setattr, module, name, function)
            setattr(module, name, watch.timing(function))
        undo.callback(delattr, adapter, "image_spans")
        adapter.image_spans = watch.timing(adapter.image_spans)
        yield watch
