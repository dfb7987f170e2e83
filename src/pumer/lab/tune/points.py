"""Predictions for a point before any example is run: tokens, FLOPs, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import pumer
from pumer.costs.report import report
from pumer.costs.result import Report
from pumer.lab.bench.latency import LatencyModel
from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.run import first_rows, forward
from pumer.lab.tune.space import GridPoint

_MEMORY_ROWS = (
    4  # examples of the forward whose memory is followed; activations grow with the batch
)


@dataclass(frozen=True)
class Bounds:
    """Bounds that the setting must keep.

    >>> Bounds(drop=1.0).drop
    1.0


    Args:
        drop: most points of accuracy to lose against the unreduced model.
        speedup: least factor by which a forward gets faster.
        memory: most bytes of weights and activations in a forward.
    """

    drop: float | None = None
    speedup: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.drop is None and self.speedup is None and self.memory is None:
            raise ValueError(
                "give a bound: --max_drop POINTS, --min_speedup FACTOR or --max_memory SIZE"
            )
        if self.drop is not None and not 0 < self.drop < 100:
            raise ValueError(
                "--max_drop is in points of accuracy, more than 0 and less than 100, not "
                f"{self.drop}"
            )
        if self.speedup is not None and self.speedup < 1:
            raise ValueError(f"--min_speedup is a factor from 1, not {self.speedup}")


@dataclass(frozen=True)
class Planned:
    """A point with the predictions of this machine's latency and memory models.

    Args:
        point: the settings.
        flops_ratio: how many times fewer FLOPs than unreduced.
        speedup: how many times faster, predicted.
        memory: bytes of weights and peak activations, where a bound asks for them.
    """

    point: GridPoint
    flops_ratio: float
    speedup: float
    memory: int | None = None

    def violated_bound(self, bounds: Bounds, corrections: Mapping[str, float] | None = None) -> str:
        """The bound that it is predicted to violate, as a word for a table; "" for none.

        `corrections` are factors of the predicted "speedup" and "memory", from measured points.
        """
        by = {"speedup": 1.0, "memory": 1.0} | dict(corrections or {})
        if bounds.speedup is not None and self.speedup * by["speedup"] < bounds.speedup:
            return "too slow"
        if (
            bounds.memory is not None
            and self.memory is not None
            and self.memory * by["memory"] > bounds.memory
        ):
            return "too large"
        return ""


def plan(
    model: nn.Module,
    points: Sequence[GridPoint],
    latency: LatencyModel,
    base: Report,
    inputs: Mapping[str, Tensor],
    memory: bool,
) -> list[Planned]:
    """Predict FLOPs, speed-up and, on request, memory of every point, fastest first.

    Args:
        model: unreduced.
        points: settings that fit it.
        latency: model of this machine.
        base: report of the unreduced model for the lengths to plan for.
        inputs: a batch of the size to plan for.
        memory: follow a forward of a few examples of each point and scale its peak to the batch.
    """
    text, image = base.entry
    usual = report(model).entry[1]
    batch = len(inputs["input_ids"])
    rows = min(batch, _MEMORY_ROWS)
    few = first_rows(inputs, rows)
    unreduced = latency.seconds(base)
    planned_points = []
    for point in points:
        with pumer.reduced(model, point.reducer):
            planned = report(model, text, None if image == usual else image)
            size = None
            if memory:
                size = weight_bytes(model) + round(peak_memory(model, few) * batch / rows)
        planned_points.append(
            Planned(point, planned.ratio, unreduced / latency.seconds(planned), size)
        )
    return sorted(planned_points, key=lambda candidate: (-candidate.speedup, candidate.point.name))


def peak_memory(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Peak activation bytes of one forward."""
    call, device = forward(model, dict(inputs)), next(model.parameters()).device
    if device.type == "cuda":
        call()  # libraries set memory aside at their first use
    return peak_activations(call, device)


def check_reachable(planned: Sequence[Planned], bounds: Bounds) -> None:
    """Raise ValueError, naming the nearest point, if no point is predicted to keep the speed and
    memory bounds."""
    if any(not candidate.violated_bound(bounds) for candidate in planned):
        return
    parts = []
    if bounds.speedup is not None:
        fastest = max(planned, key=lambda candidate: candidate.speedup)
        parts.append(
            f"the fastest, {fastest.point.name}, is predicted to be {fastest.speedup:.2f} times "
            "as fast"
        )
    if bounds.memory is not None:
        smallest = min(planned, key=lambda candidate: candidate.memory or 0)
        parts.append(
            f"the smallest, {smallest.point.name}, takes {(smallest.memory or 0) / 1e6:.0f} MB"
        )
    quick = [
        candidate
        for candidate in planned
        if bounds.speedup is not None and candidate.speedup >= bounds.speedup
    ]
    if quick and bounds.memory is not None:
        smallest = min(quick, key=lambda candidate: candidate.memory or 0)
        parts.append(
            f"the smallest that is fast enough, {smallest.point.name}, "
            f"{(smallest.memory or 0) / 1e6:.0f} MB"
        )
    raise ValueError(
        f"no setting of the grid keeps to the bound: {'; '.join(parts)}. Loosen the bound, or "
        "widen the grid"
    )
