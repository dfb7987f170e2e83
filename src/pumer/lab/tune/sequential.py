"""How much a candidate loses, with an interval that holds however often one looks.

Candidate and reference predict the same examples, and each example gives the difference of their
scores, from -1 to 1. Most differences are 0, so their mean is known far sooner than either score.

Looking after every batch and stopping when the answer pleases breaks ordinary intervals. Those here
are a confidence
sequence: with probability 1 - alpha the bound on a side is right at all looks at once. It comes
from betting (Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", JRSS
B 86, 2024). To refute that the mean drop is `bound` or more, somebody starts with 1 and before each
example stakes a share of what they have on its being less: were the mean `bound` or more, their
wealth could not be expected to grow, and would ever reach 1 / alpha with probability alpha at most
(Ville's inequality). We bet constant stakes, several at once, and average their wealth: the paper's
diversified Kelly bettor. Wealth then depends on how often each difference was seen, not on their
order. Stakes chosen before the first example keep all of this true, so where the spread of the
differences is known from other examples, `stakes_for` takes those that tell most after a given
number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

# With differences and bounds from -1 to 1 any stake below 1/2 leaves something. Small ones serve
# small effects.
STAKES = np.geomspace(0.01, 0.49, 12)
_MOST = 0.49
_PARTS, _ROUNDS = (
    32,
    5,
)  # of the search for an interval's end: 32^-5 is far below what a score is rounded to


@dataclass
class PairedDrop:
    """Mean of (reference score - candidate score) over examples, with a lower and an upper bound
    for it.

    The examples have to be independent of each other: one of an image.

    Args:
        alpha: probability that a side is ever wrong, of each.
        stakes: shares of the wealth to bet, between 0 and 1/2.
    """

    alpha: float = 0.05
    stakes: np.ndarray = field(default_factory=lambda: STAKES)
    counts: dict[float, int] = field(default_factory=dict)
    lower: float = -1.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, not {self.alpha}")

    def update(self, differences: Iterable[float]) -> None:
        """Look at more examples; raises ValueError for differences outside [-1, 1]."""
        for difference in differences:
            if not -1 <= difference <= 1:
                raise ValueError(
                    f"scores lie between 0 and 1, so they cannot differ by {difference}"
                )
            key = round(difference, 6)
            self.counts[key] = self.counts.get(key, 0) + 1
        # What one look has ruled out stays ruled out.
        self.upper = min(self.upper, self._end(below=True))
        self.lower = max(self.lower, self._end(below=False))

    @property
    def number(self) -> int:
        """Examples seen."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean drop of those, 0 before the first."""
        return sum(value * count for value, count in self.counts.items()) / max(self.number, 1)

    @property
    def standard_error(self) -> float:
        """Of the mean, 1 before the second example."""
        num_examples, mean = self.number, self.mean
        if num_examples < 2:
            return 1.0
        spread = sum(count * (value - mean) ** 2 for value, count in self.counts.items())
        # One more example that differs keeps few equal scores from looking like certainty.
        return math.sqrt((spread + 1) / (num_examples - 1) / num_examples)

    def stakes_for(self, total: int, alpha: float) -> np.ndarray:
        """Stakes for a new test of `total` examples like the ones seen."""
        spread = max(self.number * self.standard_error**2, 1 / total)
        best = math.sqrt(-2 * math.log(alpha) / (total * spread))
        return np.minimum(best * np.array([0.7, 1.0, 1.4]), _MOST)

    def reachable(self, bound: float, total: int, errors: float, alpha: float) -> bool:
        """Whether a test of `total` examples would show that the drop is at most `bound`, were they
        like those seen.

        Args:
            bound: in the units of the differences.
            total: examples in all.
            errors: suppose a true drop this many standard errors above the mean seen so far; below
                it if negative.
            alpha: of that test.
        """
        shift = errors * self.standard_error
        values, weights = self._histogram()
        stakes = self.stakes_for(total, alpha)[:, None]
        gains = np.log1p((stakes * (bound - values - shift)).clip(-0.99)) @ weights
        return bool(_log_mean(gains * (total / max(self.number, 1))) >= -math.log(alpha))

    def _histogram(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(list(self.counts), dtype=float), np.array(
            list(self.counts.values()), dtype=float
        )

    def _end(self, below: bool) -> float:
        """The bound that is just refuted: the least that the mean is shown to lie below, or the
        most, above."""
        values, weights = self._histogram()
        possible, refuted = self.mean, 1.0 if below else -1.0
        stakes = np.sign(refuted) * self.stakes[:, None, None]
        for _ in range(_ROUNDS):  # each narrows it down to a part of what the one before left
            bounds = np.linspace(possible, refuted, _PARTS + 1)
            won = _log_mean(np.log1p(stakes * (bounds[:, None] - values)) @ weights) >= -math.log(
                self.alpha
            )
            if not won[-1]:
                break
            end_index = int(won.argmax())
            possible, refuted = bounds[end_index - 1], bounds[end_index]
        return float(refuted)


def _log_mean(logs: np.ndarray) -> np.ndarray:
    """Logarithm of the mean over the first axis of numbers given as logarithms."""
    most = logs.max(0)
    return most + np.log(np.exp(logs - most).mean(0))
