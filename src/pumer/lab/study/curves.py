"""From rows to settings and curves, and confidence intervals of the difference of two methods.

Every point of a study is scored on the same examples, so two points are compared cluster by cluster
(a cluster is usually an image). This resolves far smaller differences than the intervals of either
point. Every interval covers two sources of variance:

* the choice of examples, by the cluster-robust variance of the mean (Liang and Zeger, 1986);
* the training seed, by the variance over the seeds of a setting, pooled over the settings of a
  method, since one method's trainings may scatter ten times as far as another's.

Where methods are compared at a measured speed, the error of the speeds is a third one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pumer.lab.study.results import unpack_scores

Quantity = Callable[["Setting"], float | None]
"""A quantity of a setting, None where it was not measured."""
Variance = tuple[float, float]
"""A variance in squared points, and its degrees of freedom."""
_MEDIAN = 0.745
"""Standard error of the median of n normal values, divided by (their 80th - 20th percentile) /
sqrt(n)."""


@dataclass(frozen=True)
class Spread:
    """Variance of the accuracy over training seeds.

    Args:
        variance: in squared points, of one training.
        freedom: its degrees of freedom.
    """

    variance: float
    freedom: int


Spreads = Mapping[str, Spread]
"""By method."""


@dataclass(frozen=True)
class Setting:
    """The rows of one setting of a method, one per seed, and their means.

    Args:
        method: its name.
        label: distinguishes it from the method's other settings.
        rows: of the results.
        speed: its row of the speeds, None if it was not timed.
        scores: sum of the scores of every cluster, mean over the seeds.
        counts: examples of every cluster.
    """

    method: str
    label: str
    rows: tuple[dict[str, Any], ...]
    speed: dict[str, Any] | None
    scores: np.ndarray
    counts: np.ndarray

    def mean(self, column: str) -> float:
        """The mean of a column over the seeds."""
        return float(np.mean([row[column] for row in self.rows]))

    @property
    def accuracy(self) -> float:
        """In percent."""
        return float(100 * self.scores.sum() / self.counts.sum())

    @property
    def speed_up(self) -> float | None:
        """Measured speed-up over the unreduced model; None if it was not timed."""
        return None if self.speed is None else float(self.speed["x_unreduced"])

    @property
    def rounds(self) -> int:
        """Timed rounds; 0 if it was not timed."""
        return 0 if self.speed is None else int(self.speed["runs"])

    @property
    def speed_up_error(self) -> float:
        """Standard error of the median speed-up, assuming normal rounds; 0 without rounds."""
        if self.speed is None:
            return 0.0
        return _MEDIAN * (self.speed["x_high"] - self.speed["x_low"]) / math.sqrt(self.rounds)

    @property
    def flops_ratio(self) -> float:
        """How many times fewer FLOPs than unreduced."""
        return self.mean("unreduced_gflops") / self.mean("gflops")


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies in points, with its 95 % interval."""

    value: float
    half_width: float

    @property
    def verdict(self) -> str:
        """Which of the two is above, or "no telling" where the interval holds 0."""
        if abs(self.value) <= self.half_width:
            return "no telling"
        return "above" if self.value > 0 else "below"

    def __str__(self) -> str:
        return f"{self.value:+.1f} ± {self.half_width:.1f}"


@dataclass(frozen=True)
class Interpolated:
    """A point on a curve, between two settings or at one.

    Args:
        parts: settings and their weights, which sum to one.
        placing: variances of its accuracy due to the error of the settings' position.
    """

    parts: tuple[tuple[Setting, float], ...]
    placing: tuple[Variance, ...] = ()

    @property
    def scores(self) -> np.ndarray:
        """Sum of the scores of every cluster."""
        return np.sum([weight * setting.scores for setting, weight in self.parts], axis=0)


def settings_of(
    rows: Iterable[dict[str, Any]], speeds: Iterable[dict[str, Any]] = ()
) -> list[Setting]:
    """Group the rows of results by setting, in order of appearance, and attach the speeds."""
    speed = {row["setting"]: row for row in speeds}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    settings = []
    for (method, name), group in groups.items():
        tables = np.stack([unpack_scores(row["scores"]) for row in group])
        scores, counts = tables[:, 0].mean(0), tables[0, 1]
        settings.append(
            Setting(method, group[0]["label"], tuple(group), speed.get(name), scores, counts)
        )
    return settings


def seed_spreads(settings: Iterable[Setting]) -> dict[str, Spread]:
    """The spread over the seeds of every method, pooled over its settings.

    Methods of a single setting are pooled; a method with a single seed gets the spread of all.
    Empty where every setting has a single seed.
    """
    methods: dict[str, list[Setting]] = {}
    for setting in settings:
        methods.setdefault(setting.method, []).append(setting)
    alone = [group[0] for group in methods.values() if len(group) == 1]
    common_spread = _spread(itertools.chain(*methods.values()))
    spreads = {
        name: _spread(group if len(group) > 1 else alone) or common_spread
        for name, group in methods.items()
    }
    return {name: spread for name, spread in spreads.items() if spread}


def half_width(setting: Setting, spreads: Spreads) -> float:
    """Half of the 95 % interval of a setting's accuracy, in points."""
    return _half_width(setting.scores, setting.counts, _trained(on_curve(setting).parts, spreads))


def difference(one: Interpolated, other: Interpolated, spreads: Spreads) -> Difference:
    """Accuracy at one point of a curve minus that at another, in points."""
    counts = one.parts[0][0].counts
    score_gap = one.scores - other.scores
    variances = [*_trained((*one.parts, *other.parts), spreads), *one.placing, *other.placing]
    return Difference(
        float(100 * score_gap.sum() / counts.sum()), _half_width(score_gap, counts, variances)
    )


def on_curve(setting: Setting) -> Interpolated:
    """A setting as a point on its curve."""
    return Interpolated(((setting, 1.0),))


def interpolate(
    curve: Sequence[Setting], axis: Quantity, where: float, error: Quantity | None = None
) -> Interpolated | None:
    """The point on a curve where `axis` has a value, by linear interpolation; None beyond its ends.

    `error` is the standard error of a setting's value.
    """
    located = [(value, setting) for setting in curve if (value := axis(setting)) is not None]
    ordered = sorted(located, key=lambda pair: pair[0])
    for (low, lower), (high, upper) in pairwise(ordered):
        if low <= where <= high and low < high:
            share = (where - low) / (high - low)
            slope = (upper.accuracy - lower.accuracy) / (high - low)
            parts = ((lower, 1 - share), (upper, share))
            if error is None:
                return Interpolated(parts)
            # Percentiles of a few rounds estimate a spread with half the degrees of freedom.
            placing = (
                ((slope * part * (error(end) or 0.0)) ** 2, (end.rounds - 1) / 2)
                for end, part in parts
            )
            return Interpolated(parts, tuple(variance for variance in placing if variance[0]))
    return None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (cost, accuracy), by cost.

    >>> pareto([(1.0, 70.0), (2.0, 60.0), (3.0, 80.0)])
    [0, 2]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _spread(settings: Iterable[Setting]) -> Spread | None:
    groups = [[row["accuracy"] for row in setting.rows] for setting in settings]
    freedom = sum(len(group) - 1 for group in groups)
    return (
        Spread(sum(float(np.var(group)) * len(group) for group in groups) / freedom, freedom)
        if freedom
        else None
    )


def _trained(parts: Iterable[tuple[Setting, float]], spreads: Spreads) -> list[Variance]:
    """Variances of a weighted sum of accuracies due to the seeds, one for each spread."""
    shares: dict[Spread, float] = {}
    for setting, weight in parts:
        spread = spreads.get(setting.method)
        if spread and setting.rows[0]["training"]:
            shares[spread] = shares.get(spread, 0.0) + weight**2 / len(setting.rows)
    return [(share * spread.variance, spread.freedom) for spread, share in shares.items()]


def _half_width(scores: np.ndarray, counts: np.ndarray, others: Iterable[Variance]) -> float:
    """Half of the 95 % interval of a mean score, in points.

    Args:
        scores: sum of every cluster.
        counts: examples of every cluster.
        others: variances besides that of the choice of clusters.
    """
    from scipy.special import stdtrit  # the quantile of Student's t

    total, clusters = counts.sum(), len(counts)
    residual = scores - scores.sum() / total * counts
    drawn = 100**2 * float((residual**2).sum()) / total**2 * clusters / max(clusters - 1, 1)
    variances = [(drawn, max(clusters - 1, 1)), *others]
    total_variance = sum(variance for variance, _ in variances)
    if not total_variance:
        return 0.0
    # Degrees of freedom of a sum of variances (Welch, 1947; Satterthwaite, 1946).
    freedom = total_variance**2 / sum(
        variance**2 / freedom_of_part for variance, freedom_of_part in variances
    )
    return float(stdtrit(freedom, 0.975)) * math.sqrt(total_variance)
