"""A latency model of this machine: predicts the time of a forward from its lengths, fitted to a few
timed forwards.

Multiply-accumulates alone miss other costs of a forward: kernel launches, memory traffic of norms
and activations, the softmax, and the reducer's own traffic. Each of these is a term, an amount of
work that follows from the planned lengths, and the fit finds the time per unit. Least squares with
non-negative coefficients, because no work takes negative time. The model is valid for the batch
size it was fitted to: twice the examples can take more than twice the time once their states no
longer fit a cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from pumer.adapters import find
from pumer.api import active
from pumer.costs.report import report
from pumer.costs.result import TOWERS, Report
from pumer.lab.bench.run import FUSED, forward, variants
from pumer.lab.bench.timing import alternate
from pumer.reducers import Compose, PuMer, Random, Reducer, ToMe

Seconds = dict[str, float]


@dataclass(frozen=True)
class LatencyModel:
    """Seconds per unit of each term of `work`, for one batch size; see `calibrate`.

    Args:
        costs: seconds per unit, by term; terms that occurred in no calibration forward are absent.
    """

    costs: Mapping[str, float]

    def seconds(self, planned: Report) -> float:
        """Predicted seconds of a forward with these lengths; raises ValueError for terms that were
        not calibrated."""
        done = work(planned)
        unknown = sorted(name for name, amount in done.items() if amount and name not in self.costs)
        if unknown:
            raise ValueError(
                f"nothing timed had a cost for {', '.join(unknown)}: calibrate on this model"
            )
        return sum(self.costs[name] * amount for name, amount in done.items() if amount)


def work(planned: Report) -> dict[str, float]:
    """Amounts of work of a forward per example, by term: multiply-accumulates, tokens, attending
    pairs, bytes.

    Args:
        planned: lengths of the model with its reducer, and the reducer's cost.
    """
    forwards_per_example, parts = planned.forwards_per_example, planned.parts
    counts, tower = [sum(pair) for pair in planned.lengths], planned.tower[:-1]
    return {
        "forward": 1.0,  # and everything else that no reducer changes
        "towers": sum(parts.get(part, 0) for part in TOWERS),
        "tower tokens": forwards_per_example * sum(tower),
        "tower pairs": forwards_per_example * sum(n * n for n in tower),
        "products": parts["attention"] + parts["mlp"],
        "tokens": forwards_per_example * sum(counts[1:]),
        "pairs": forwards_per_example * sum(n * n for n in counts[:-1]),
        "reducer": parts["reducer"],
        "reducer operators": planned.reducer_cost.operators,
        "reducer traffic": planned.reducer_cost.traffic,
    }


def fit(amounts: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> LatencyModel:
    """The non-negative costs closest to the measured times, by relative error.

    Args:
        amounts: `work` of every timed forward.
        seconds: their times.
    """
    from scipy.optimize import nnls  # of the extra tune: `pumer tune --help` works without it

    terms = [name for name in amounts[0] if any(amount[name] for amount in amounts)]
    matrix = (
        np.array([[amount[name] for name in terms] for amount in amounts])
        / np.array(seconds)[:, None]
    )
    scale = matrix.max(0)
    seconds_per_unit = nnls(matrix / scale, np.ones(len(seconds)))[0] / scale
    return LatencyModel(dict(zip(terms, seconds_per_unit.tolist(), strict=True)))


def calibration_reducers(model: nn.Module) -> dict[str, Reducer]:
    """Reducers whose forwards separate the terms: different lengths in different layers, with cheap
    and expensive reducers."""
    adapter = find(model)
    depth, tower = adapter.depth(model), adapter.tower_depth(model)
    early, middle, late, every = 0, depth // 3, 2 * depth // 3, tuple(range(depth - 1))
    inside: list[Reducer] = [
        Random(prune=0.4),
        Random(prune=0.8),
        Random(prune=0.5, layers=(middle,)),
        PuMer(prune=0.1, merge=0.0, merge_text=0.0, layers=tuple(sorted({early, middle, late}))),
        PuMer(prune=0.0, merge=0.05, merge_text=0.0, layers=every),
        PuMer(prune=0.0, merge=0.1, merge_text=0.2, layers=every),
        PuMer(prune=0.05, merge=0.1, merge_text=0.0, layers=every),
        PuMer(prune=0.0, merge=0.2, merge_text=0.0, layers=every),
        PuMer(prune=0.0, merge=0.3, merge_text=0.0, layers=(early,)),
        PuMer(prune=0.2, merge=0.4, merge_text=0.0, layers=(early,)),
        PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=tuple(sorted({middle, late}))),
        PuMer(prune=0.3, merge=0.4, merge_text=0.0, layers=(late,)),
    ]
    if tower:
        patches = adapter.default_lengths(model)[1] - 1
        for share in (0.3, 0.7):
            each = max(1, int(share * patches / tower))
            inside.append(
                Compose(ToMe(r=each, depth=tower), PuMer(0.1, 0.2, 0.0, layers=(middle,)))
            )
    return {f"{index} {reducer.name}": reducer for index, reducer in enumerate(inside)}


def measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    reducers: Mapping[str, Reducer],
    runs: int = 5,
) -> tuple[Seconds, dict[str, Report]]:
    """Time a model unreduced and with each reducer; returns seconds and planned lengths by name.

    Each reducer alternates with the unreduced model alone, because the speed of a forward also
    depends on the memory that the one before it left. Its time is the median share of the unreduced
    time, times the median of the latter over all.

    Args:
        model: a supported, unpatched model.
        inputs: a batch.
        reducers: to time, by name; the unreduced model is `bench.run.FUSED`.
        runs: timed rounds of each.
    """
    device = next(model.parameters()).device
    nets = {
        name: net
        for name, net in variants(model, dict(reducers)).items()
        if name in (FUSED, *reducers)
    }
    calls = {name: forward(net, dict(inputs)) for name, net in nets.items()}
    shares, unreduced = {FUSED: 1.0}, list[float]()
    for name in reducers:
        timings = alternate({other: calls[other] for other in (FUSED, name)}, runs, 1, device)
        base = timings[FUSED].seconds
        shares[name] = statistics.median(
            reduced_seconds / base_seconds
            for reduced_seconds, base_seconds in zip(timings[name].seconds, base, strict=True)
        )
        unreduced += base
    seconds = {name: share * statistics.median(unreduced) for name, share in shares.items()}
    return seconds, {name: planned(net, nets[FUSED]) for name, net in nets.items()}


def planned(net: nn.Module, ran: nn.Module) -> Report:
    """Report of a model for texts and images as long as in the last forward of `ran`, reduced or
    not."""
    patch = active(ran)
    assert patch is not None
    assert patch.entry is not None
    text, image, _ = patch.entry
    usual = find(ran).default_lengths(ran)[1]
    return report(net, text, None if image == usual else image)


def calibrate(model: nn.Module, inputs: Mapping[str, Tensor], runs: int = 5) -> LatencyModel:
    """Time a few forwards of a model and fit its latency model; takes seconds on an idle machine.

    Args:
        model: a supported, unpatched model on its device.
        inputs: a batch as it will be used.
        runs: timed rounds of each.
    """
    seconds, reports = measure(model, inputs, calibration_reducers(model), runs)
    return fit([work(reports[name]) for name in seconds], list(seconds.values()))
