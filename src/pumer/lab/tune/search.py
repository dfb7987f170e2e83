"""The search: which point to judge next, when to stop judging it, and which one to accept.

The first points halve the grid, the others Optuna's TPE sampler proposes. Each is judged on one
batch after another, against the unreduced model on the same examples, until the answer is plain.
Most points never are judged:

* the latency and memory models rule out those that break a bound on speed or memory;
* where one point reduces less than another everywhere (`space.dominates`), the harsher one is
  assumed to lose more: once the milder one has lost too much, the harsher one is out, and where
  speed is bounded, the mildest that keep to it suffice;
* with a bound on the drop, points that are slower than a promising one are not needed.

A point that looks best is then checked on fresh examples that no choice has depended on. The k-th
to be checked gets alpha / 2^k, so that the whole search accepts a point that loses more than the
bound with probability alpha at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from torch import nn

import pumer
from pumer.lab.progress import Log, no_log
from pumer.lab.tune.examples import ExamplePool
from pumer.lab.tune.points import Bounds, Planned
from pumer.lab.tune.sequential import PairedDrop
from pumer.lab.tune.space import GridPoint, Space, dominates

LOOK = 4
"""Batches between two looks at the test."""
STARTUP = 10
"""Points that are judged before TPE has something to go by."""
_ERROR = 0.05  # of each side of the intervals that points are judged by
_OUT = ("over", "hopeless", "doubtful", "worse", "failed")


@dataclass(frozen=True)
class Verdict:
    """The result of judging a point; drops are in points of accuracy.

    Args:
        status: "over" the bound or "worse" than another point, both significantly; "hopeless",
            "doubtful" or "promising" as to being accepted; "judged" to the end; after the check
            "accepted" or "failed"; "unfit" if it breaks a bound when measured.
        examples: number of examples.
        drop: mean loss against the unreduced model on them.
        low: lower bound of that loss.
        high: upper bound.
    """

    status: str
    examples: int
    drop: float
    low: float
    high: float


class Search:
    """A search whose state is an Optuna study: created again over the same study, it resumes.

    Args:
        model: unreduced, on its device.
        space: the grid.
        planned: its points with their predictions.
        bounds: what to keep to.
        pool: examples; the first `race` batches are for choosing, the next `check` ones for
            checking.
        study: stores the state.
        alpha: probability of accepting a point that loses more than the bound.
        trials: points to judge at most.
        seed: of the proposals.
        log: called with a line at every decision.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        planned: Sequence[Planned],
        bounds: Bounds,
        pool: ExamplePool,
        race: int,
        check: int,
        study: optuna.Study,
        alpha: float = 0.1,
        trials: int = 80,
        seed: int = 0,
        log: Log = no_log,
    ) -> None:
        self.model, self.space, self.bounds, self.pool, self.study = (
            model,
            space,
            bounds,
            pool,
            study,
        )
        self.race, self.check = range(race), range(race, race + check)
        self.alpha, self.trials, self.seed, self.log = alpha, trials, seed, log
        self.planned = list(planned)
        self._dominates = dominates([candidate.point for candidate in self.planned])
        self.judged: dict[str, Verdict] = {}
        self.checked: dict[str, Verdict] = {}
        self._scores: dict[str, list[float]] = {}
        waiting = 0
        for trial in study.get_trials(deepcopy=False):
            if trial.state == optuna.trial.TrialState.COMPLETE:
                name = trial.user_attrs["point"]
                self.judged[name] = Verdict(**trial.user_attrs["judged"])
                self._scores[name] = trial.user_attrs["scores"]
            elif trial.state == optuna.trial.TrialState.RUNNING:  # when the process was stopped
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            elif trial.state == optuna.trial.TrialState.WAITING:  # or right before
                waiting += 1
        for _ in range(waiting):  # or the next ones would be given their settings
            study.tell(self._ask(), state=optuna.trial.TrialState.FAIL)
        stored = study.user_attrs  # a copy
        self.corrections: dict[str, float] = stored.get("corrections", {})
        self._unfit: list[str] = stored.get("unfit", [])
        self._base = {
            int(key.removeprefix("base/")): stored[key] for key in stored if key.startswith("base/")
        }
        for key in stored:
            if key.startswith("check/"):
                self.checked[key.removeprefix("check/")] = Verdict(**stored[key])

    # --- the choice ---

    def best(self) -> Planned | None:
        """The point to check next: the fastest promising one, or, without a bound on the drop, the
        one that loses least."""
        wanted = (
            ("promising", "accepted") if self.bounds.drop is not None else ("judged", "accepted")
        )
        chosen = [
            candidate
            for candidate in self.planned
            if self.status(candidate) in wanted
            and not candidate.violated_bound(self.bounds, self.corrections)
        ]
        if self.bounds.drop is not None:
            return max(chosen, key=lambda candidate: candidate.speedup, default=None)
        return min(
            chosen, key=lambda candidate: self.judged[candidate.point.name].drop, default=None
        )

    def excluded(self) -> dict[str, str]:
        """Points that need not be judged, by name, with the reason."""
        best = self.best()
        out = np.array([self.status(candidate) in _OUT for candidate in self.planned])
        lacking = [
            candidate.violated_bound(self.bounds, self.corrections) for candidate in self.planned
        ]
        fits = np.array([not lack for lack in lacking])
        why = {}
        for column, (candidate, lack) in enumerate(zip(self.planned, lacking, strict=True)):
            milder_ones = self._dominates[:, column]
            if candidate.point.name in self.judged:
                continue
            if lack:
                why[candidate.point.name] = lack
            elif (milder_ones & out).any():
                why[candidate.point.name] = (
                    f"harsher than {self.planned[(milder_ones & out).argmax()].point.name}"
                )
            elif self.bounds.drop is None and (milder_ones & fits).any():
                # Where speed or memory is bounded, a harsher one than need be loses more than it
                # has to.
                why[candidate.point.name] = (
                    f"harsher than {self.planned[(milder_ones & fits).argmax()].point.name}"
                )
            elif (
                self.bounds.drop is not None
                and best is not None
                and candidate.speedup <= best.speedup
            ):
                why[candidate.point.name] = "slower than the best"
        return why

    def open_points(self) -> list[Planned]:
        """Points that may still be better than the best one."""
        done = self.excluded().keys() | self.judged.keys()
        return [candidate for candidate in self.planned if candidate.point.name not in done]

    def status(self, one: Planned) -> str:
        """Current status of a point, "" if it was not judged."""
        verdict = self.checked.get(one.point.name) or self.judged.get(one.point.name)
        return (
            "" if verdict is None else "unfit" if one.point.name in self._unfit else verdict.status
        )

    @property
    def predictions(self) -> int:
        """Examples predicted so far, including those of the unreduced model."""
        verdicts = (*self.judged.values(), *self.checked.values())
        return sum(map(len, self._base.values())) + sum(verdict.examples for verdict in verdicts)

    # --- the search ---

    def run(self) -> Planned | None:
        """Judge points until none is open or `trials` are used up; returns the best one, None if
        none is promising."""
        while len(self.judged) < self.trials:
            candidates = self.open_points()
            if not candidates:
                break
            trial, candidate = self._propose(candidates)
            verdict, scores = self._judge(candidate)
            name = candidate.point.name
            trial.set_user_attr("point", name)
            trial.set_user_attr("scores", scores)
            trial.set_user_attr("judged", vars(verdict))
            self.study.tell(trial, self._value(candidate, verdict))
            self.judged[name], self._scores[name] = verdict, scores
            self.log(
                f"{len(self.judged)}: {name}: {candidate.speedup:.2f}x predicted, loses "
                f"{verdict.drop:.2f} ({verdict.low:.2f} to {verdict.high:.2f}) on "
                f"{verdict.examples} examples, {verdict.status}; {len(self.open_points())} points "
                "open"
            )
        return self.best()

    def verify(self, one: Planned) -> Verdict:
        """Check a point on fresh examples and store the verdict, "accepted" or "failed"."""
        name, bound = one.point.name, self.bounds.drop
        if name not in self.checked:
            alpha = self._next_alpha
            total = len(self.check) * self.pool.batch_size
            before = PairedDrop()
            before.update(self._differences(name))
            test = PairedDrop(alpha, before.stakes_for(total, alpha))
            status = "failed" if bound is not None else "accepted"
            for batches in _looks(self.check):
                scores = self._predict(one.point, batches)
                test.update(a - b for a, b in zip(self.base(batches), scores, strict=True))
                if bound is None:
                    continue
                if test.upper <= bound / 100:
                    status = "accepted"
                    break
                if test.lower > bound / 100 or not test.reachable(bound / 100, total, -2.0, alpha):
                    break
            self.checked[name] = _verdict_of(test, status)
            self.study.set_user_attr(f"check/{name}", vars(self.checked[name]))
        return self.checked[name]

    def correct(self, one: Planned, speedup: float, memory: int | None) -> None:
        """Reject a point that breaks a bound when measured, and correct all predictions by it."""
        self._unfit = [*self._unfit, one.point.name]
        self.study.set_user_attr("unfit", self._unfit)
        self.corrections = {"speedup": speedup / one.speedup}
        if memory is not None and one.memory is not None:
            self.corrections["memory"] = memory / one.memory
        self.study.set_user_attr("corrections", self.corrections)

    def base(self, batches: range) -> list[float]:
        """Scores of the unreduced model on these batches, predicted once."""
        missing = [batch_index for batch_index in batches if batch_index not in self._base]
        if missing:
            with pumer.reduced(self.model, pumer.Unreduced()):
                scored = zip(missing, self.pool.scores(self.model, missing), strict=False)
                for batch_index, scores in scored:
                    self.study.set_user_attr(f"base/{batch_index}", scores)
                    self._base[batch_index] = scores
        return [score for batch_index in batches for score in self._base.get(batch_index, ())]

    # --- inside ---

    def _propose(self, candidates: Sequence[Planned]) -> tuple[optuna.Trial, Planned]:
        """A trial for an open point: a startup point, or the one nearest to the sampler's
        proposal."""
        if len(self.judged) < STARTUP:
            return self._trial_of(self._halving(candidates))
        # A new sampler for each proposal, so that a resumed search makes the same ones.
        seed = self.seed + 1000 * len(self.judged)
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
        trial = self._ask()
        wanted = trial.params
        nearest = min(
            candidates,
            key=lambda candidate: self._distance(wanted, self.space.indices(candidate.point)),
        )
        if self.space.indices(nearest.point) == wanted:
            return trial, nearest
        self.study.tell(
            trial, state=optuna.trial.TrialState.FAIL
        )  # which the sampler does not learn from
        return self._trial_of(nearest)

    def _trial_of(self, candidate: Planned) -> tuple[optuna.Trial, Planned]:
        self.study.enqueue_trial(self.space.indices(candidate.point))
        return self._ask(), candidate

    def _halving(self, candidates: Sequence[Planned]) -> Planned:
        """The open point of median speed, of each method in turn: either verdict rules out about
        half of the others."""
        tomes = sorted({candidate.point.tome > 0 for candidate in candidates})
        tome = tomes[len(self.judged) % len(tomes)]
        points = sorted(
            (candidate for candidate in candidates if (candidate.point.tome > 0) == tome),
            key=lambda candidate: candidate.speedup,
        )
        return points[len(points) // 2]

    def _ask(self) -> optuna.Trial:
        distributions = {
            name: optuna.distributions.IntDistribution(0, len(values) - 1)
            for name, values in self.space.axes.items()
        }
        return self.study.ask(distributions)  # type: ignore[arg-type]

    def _distance(self, indices: dict[str, int], other_indices: dict[str, int]) -> float:
        return sum(
            abs(indices[name] - other_indices[name]) / max(len(self.space.axes[name]) - 1, 1)
            for name in indices
        )

    def _value(self, candidate: Planned, verdict: Verdict) -> float:
        """The sampler's objective: speed-up where the bound is kept, else minus the excess drop."""
        if self.bounds.drop is None:
            return -verdict.drop
        return (
            candidate.speedup
            if verdict.status == "promising"
            else min(0.0, self.bounds.drop - verdict.drop)
        )

    @property
    def _next_alpha(self) -> float:
        return (
            self.alpha / 2 ** (1 + len(self.checked))
            if self.bounds.drop is not None
            else self.alpha
        )

    def _judge(self, candidate: Planned) -> tuple[Verdict, list[float]]:
        test, rival = PairedDrop(_ERROR), PairedDrop(_ERROR)
        best = self.best() if self.bounds.drop is None else None
        against = self._scores[best.point.name] if best else []
        scores: list[float] = []
        status = ""
        for batches in _looks(self.race):
            new = self._predict(candidate.point, batches)
            test.update(a - b for a, b in zip(self.base(batches), new, strict=True))
            if against:
                rival.update(a - b for a, b in zip(against[len(scores) :], new, strict=False))
            scores += new
            status = self._verdict(test, rival, last=False)
            if status:
                break
        return _verdict_of(test, status or self._verdict(test, rival, last=True)), scores

    def _differences(self, name: str) -> list[float]:
        """What was lost on each of the examples that a point was judged on."""
        scores = self._scores[name]
        batches = self.race[: -(-len(scores) // self.pool.batch_size)]
        return [a - b for a, b in zip(self.base(batches), scores, strict=True)]

    def _predict(self, point: GridPoint, batches: range) -> list[float]:
        with pumer.reduced(self.model, point.reducer):
            return [score for batch in self.pool.scores(self.model, batches) for score in batch]

    def _verdict(self, test: PairedDrop, rival: PairedDrop, last: bool) -> str:
        """Status of a point after the examples so far, "" where more are needed."""
        if self.bounds.drop is None:
            return "worse" if rival.number and rival.lower > 0 else "judged" if last else ""
        bound, total = self.bounds.drop / 100, len(self.check) * self.pool.batch_size
        alpha = self._next_alpha
        if test.lower > bound:
            return "over"
        if not test.reachable(bound, total, -2.0, alpha):
            return "hopeless"
        if test.reachable(bound, total, 0.5 if last else 2.0, alpha):
            return "promising"
        return "doubtful" if last else ""


def _looks(batches: range) -> Iterator[range]:
    """The batches in groups of `LOOK`; the test is evaluated after each."""
    for start in range(batches.start, batches.stop, LOOK):
        yield range(start, min(start + LOOK, batches.stop))


def _verdict_of(test: PairedDrop, status: str) -> Verdict:
    return Verdict(
        status, test.number, *(round(100 * x, 4) for x in (test.mean, test.lower, test.upper))
    )
