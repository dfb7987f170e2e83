"""Sequential test of a candidate's loss, with intervals that stay valid under continuous looks.

Candidate and reference predict the same examples, and each example gives the difference of their
scores, from -1 to 1. Most differences are 0, so their mean is estimated far more precisely than
either score.

Ordinary intervals are invalid when one looks after every batch and stops at will. Those here form a
confidence sequence: with probability 1 - alpha, the bound on a side holds at all looks at once. It
is constructed by betting (Waudby-Smith, Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 86, 2024):

* To refute that the mean drop is at least `bound`, a bettor starts with wealth 1 and before each
  example stakes a share of it on the drop being smaller.
* Were the mean drop at least `bound`, the expected wealth would not grow, and it would ever reach
  1 / alpha with probability at most alpha (Ville's inequality).
* We bet several constant stakes and average their wealth: the paper's diversified Kelly bettor.
  Wealth then depends on the counts of the differences, not on their order.

All of this holds for any stakes that are chosen before the first example. Where the variance of the
differences is known from other examples, `stakes_for` chooses the best ones for a given number.
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
    """Mean of (reference score - candidate score) over examples, with lower and upper bounds.

    The examples must be independent: at most one per image.

    >>> test = PairedDrop(alpha=0.05)
    >>> test.update([0.0] * 1990 + [1.0] * 10)
    >>> test.number, test.mean
    (2000, 0.005)
    >>> test.lower < test.mean < test.upper < 0.02
    True

    Args:
        alpha: error probability of each side, over all looks.
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
        """Add examples; raises ValueError for differences outside [-1, 1]."""
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
        """Number of examples."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean drop, 0 without examples."""
        return sum(value * count for value, count in self.counts.items()) / max(self.number, 1)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, 1 with fewer than two examples."""
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
        """Whether a test of `total` similar examples would show that the drop is at most `bound`.

        Args:
            bound: in the units of the differences.
            total: examples in all.
            errors: assume a true drop this many standard errors above the current mean.
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
        """The tightest bound that is refuted: the end of the interval above or below the mean."""
        values, weights = self._histogram()
        possible, refuted = self.mean, 1.0 if below else -1.0
        stakes = np.sign(refuted) * self.stakes[:, None, None]
        for _ in range(_ROUNDS):  # each narrows the end down to one of _PARTS
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
