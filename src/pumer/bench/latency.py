"""A latency model of this machine: the time of a forward from its lengths, fitted to a few forwards that were timed.

Multiply-accumulates alone miss what a forward costs besides: starting its operators, reading and writing every token
once more for norms and activations, the softmax, the sorting inside a reducer. Each of these is a term here, an amount
of work that follows from the planned lengths, and the fit finds what one unit of it costs on this machine. No unit of
work can cost less than nothing, so the fit is least squares with non-negative coefficients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from torch import Tensor, nn

from pumer.adapters import find
from pumer.api import active
from pumer.bench.run import FUSED, first_rows, forward, variants
from pumer.bench.timing import alternate
from pumer.reducers import Compose, PuMer, Random, Reducer, ToMe
from pumer.report import TOWERS, Report, report

Seconds = dict[str, float]


@dataclass(frozen=True)
class LatencyModel:
    """Seconds per unit of each term of `work`; made by `calibrate`.

    Args:
        costs: seconds per unit, by term; terms that no calibration forward had do not appear.
    """

    costs: Mapping[str, float]

    def seconds(self, planned: Report, batch: int) -> float:
        """Predicted seconds of one forward of `batch` examples with these lengths.

        Raises ValueError for a vision tower if none was in the calibration.
        """
        done = work(planned, batch)
        unknown = sorted(name for name, amount in done.items() if amount and name not in self.costs)
        if unknown:
            raise ValueError(f"nothing timed had a cost for {', '.join(unknown)}: calibrate on this model")
        return sum(self.costs[name] * amount for name, amount in done.items() if amount)


def work(planned: Report, batch: int) -> dict[str, float]:
    """Amounts of work of one forward, by term; multiply-accumulates, tokens, or pairs of tokens that attend.

    Args:
        planned: lengths and multiply-accumulates of the model with its reducer.
        batch: examples at a time.
    """
    each, parts = batch * planned.passes, planned.parts
    counts = [sum(pair) for pair in planned.lengths]
    reduced = [n for n, pair, after in zip(counts, planned.lengths, planned.lengths[1:], strict=False) if pair != after]
    tower = planned.tower[:-1]
    merged = [before for before, after in zip(planned.tower, planned.tower[1:], strict=False) if before != after]
    return {
        "forward": 1.0,
        "embedding": batch * parts["embedding"],
        "towers": batch * sum(parts.get(part, 0) for part in TOWERS),
        "tower tokens": each * sum(tower),
        "tower pairs": each * sum(n * n for n in tower),
        "products": batch * (parts["attention"] + parts["mlp"]),
        "tokens": each * sum(counts[1:]),
        "pairs": each * sum(n * n for n in counts[:-1]),
        "reductions": float(len(reduced) + len(merged)),
        "reduced tokens": each * (sum(reduced) + sum(merged)),
        "reducer": batch * parts["reducer"],
    }


def fit(amounts: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> LatencyModel:
    """The non-negative costs that come closest to the measured times, by relative error.

    Args:
        amounts: `work` of every timed forward.
        seconds: what each took.
    """
    terms = [name for name in amounts[0] if any(one[name] for one in amounts)]
    matrix = np.array([[one[name] for name in terms] for one in amounts]) / np.array(seconds)[:, None]
    scale = matrix.max(0)
    found = nnls(matrix / scale, np.ones(len(seconds)))[0] / scale
    return LatencyModel(dict(zip(terms, found.tolist(), strict=True)))


def calibration_reducers(model: nn.Module) -> dict[str, Reducer]:
    """Reducers whose forwards tell the terms apart: other lengths in other layers, with cheap and costly reducers."""
    adapter = find(model)
    depth, tower = adapter.depth(model), adapter.tower_depth(model)
    early, middle, late = 0, depth // 3, 2 * depth // 3
    inside: list[Reducer] = [
        Random(prune=0.4),
        Random(prune=0.8),
        Random(prune=0.5, layers=(middle,)),
        PuMer(prune=0.1, merge=0.0, merge_text=0.0, layers=tuple(sorted({early, middle, late}))),
        PuMer(prune=0.0, merge=0.1, merge_text=0.2, layers=tuple(range(depth - 1))),
        PuMer(prune=0.2, merge=0.4, merge_text=0.0, layers=(early,)),
        PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=tuple(sorted({middle, late}))),
        PuMer(prune=0.3, merge=0.4, merge_text=0.0, layers=(late,)),
    ]
    if tower:
        patches = adapter.default_lengths(model)[1] - 1
        for share in (0.3, 0.7):
            each = max(1, int(share * patches / tower))
            inside.append(Compose(ToMe(r=each, depth=tower), PuMer(0.1, 0.2, 0.0, layers=(middle,))))
    return {f"{number} {reducer.name}": reducer for number, reducer in enumerate(inside)}


def measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    reducers: Mapping[str, Reducer],
    runs: int = 5,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Seconds, dict[str, Report]]:
    """Time a model unreduced and with each reducer, in turns; seconds and planned lengths of each, by name.

    Whatever else the machine does slows a whole round down, so each time is taken as a share of that of the
    unreduced forward in the same round: the median share times the median unreduced time.

    Args:
        model: a supported model that nothing reduces.
        inputs: a batch.
        reducers: to time, by name; the unreduced model goes under `bench.run.FUSED`.
        runs: timed rounds.
        progress: called after every round.
    """
    device = next(model.parameters()).device
    nets = {name: net for name, net in variants(model, dict(reducers)).items() if name in (FUSED, *reducers)}
    calls = {name: forward(net, dict(inputs)) for name, net in nets.items()}
    timings = alternate(calls, runs, 1, device, progress)
    unreduced = timings[FUSED]
    seconds = {
        name: unreduced.median
        * statistics.median(one / other for one, other in zip(timing.seconds, unreduced.seconds, strict=True))
        for name, timing in timings.items()
    }
    return seconds, {name: planned(net, nets[FUSED]) for name, net in nets.items()}


def planned(net: nn.Module, ran: nn.Module) -> Report:
    """Report of a model for texts and images as long as those of the last forward of `ran`, reduced or not."""
    patch = active(ran)
    assert patch is not None
    assert patch.entry is not None
    text, image, _ = patch.entry
    usual = find(ran).default_lengths(ran)[1]
    return report(net, text, None if image == usual else image)


def calibrate(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    reducers: Mapping[str, Reducer] | None = None,
    runs: int = 5,
    progress: Callable[[], None] = lambda: None,
) -> LatencyModel:
    """Time a few forwards of a model and fit its latency model; on an idle machine a matter of seconds.

    Args:
        model: a supported model that nothing reduces, on its device.
        inputs: a batch as it will be used. Its half is timed too, which tells the cost per forward from that per
            example.
        reducers: those of the forwards to time; `calibration_reducers` if not given.
        runs: timed rounds.
        progress: called after every round; there are twice as many as `runs` and two to warm up.
    """
    reducers = calibration_reducers(model) if reducers is None else reducers
    batch = len(inputs["input_ids"])
    halves = dict(list(reducers.items())[::3])
    amounts, times = [], []
    for rows, chosen in ((batch, reducers), (max(1, batch // 2), halves)):
        seconds, reports = measure(model, first_rows(inputs, rows), chosen, runs, progress)
        amounts += [work(reports[name], rows) for name in seconds]
        times += list(seconds.values())
    return fit(amounts, times)
