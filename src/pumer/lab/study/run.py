"""Run a study: train, score and time every point once, then write tables and plots."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import torch

import pumer
from pumer._extras import need
from pumer._files import claimed, locked, replacing
from pumer._rows import append_rows, mend_rows
from pumer.costs.result import align
from pumer.lab.bench.timing import alternate
from pumer.lab.evaluate import take
from pumer.lab.progress import Log
from pumer.lab.study.curves import settings_of
from pumer.lab.study.evaluation import EvalModel, cost, load_eval_model, macs, score, sized, speed
from pumer.lab.study.plots import plot
from pumer.lab.study.points import Point, Study
from pumer.lab.study.progress import in_words, progress_bars, tracked
from pumer.lab.study.results import (
    COLUMNS,
    SPEED_COLUMNS,
    check_machine,
    read_rows,
    read_speeds,
    row,
)
from pumer.lab.study.tables import markdown
from pumer.lab.study.training import expected_seconds, train_point
from pumer.lab.tasks.base import Example, Task
from pumer.lab.train.validate import uncached
from pumer.reducers import Unreduced, from_dict, to_dict

Only = Literal["plan", "scores", "plots"] | None
"""Part of the work: print the plan, train and score, or redraw tables and plots."""
_POLL = 2.0  # seconds between looks at what other processes have left
_TRIED = 2  # examples that every setting is tried on before anything is trained


def run(
    study: Study,
    out: str | Path,
    *,
    scratch: str | Path = "runs",
    skip_impossible: bool = False,
    keep_models: bool = False,
    only: Only = None,
    device: str = "cpu",
    log: Log = print,
) -> None:
    """Train and score the points of a study that have no row yet, time its settings, write tables
    and plots.

    It can be killed at any time and resumes the training it was at. Several processes share the
    points. Speeds are measured after all trainings, in one process, or later on a quieter machine:
    `only` "scores" skips them. To measure some again, delete their rows.

    Args:
        study: what is compared.
        out: folder for NAME.csv, NAME-speed.csv, NAME.md and the plots.
        scratch: folder for `study-NAME`, where trainings lie until their points are finished.
        skip_impossible: skip settings that the model does not support, instead of refusing the
            study.
        keep_models: keep the models of finished points.
        only: see `Only`.
        device: to score and time points on, in float32; trainings use a CUDA device if there is
            one.
        log: called with progress messages.

    Raises:
        ValueError: for impossible settings, foreign rows, and trainings that fail, the first two
            before anything runs; and without matplotlib or scipy.
    """
    need("pumer study", "study", "matplotlib", "scipy")
    out = Path(out)
    results, speeds = out / f"{study.name}.csv", out / f"{study.name}-speed.csv"
    if only != "plots":
        work = _Work(
            study,
            results,
            speeds,
            Path(scratch) / f"study-{study.name}",
            skip_impossible,
            device,
            log,
        )
        if only == "plan":
            log(work.plan())
            return
        work.score(keep_models)
        if only != "scores":
            work.time(keep_models)
    rows, times = read_rows(results, study.name), read_speeds(speeds, study.name)
    if not rows:
        raise ValueError(f"{results} has no results yet")
    # Points are finished in any order; tables and legends keep that of the study.
    order = {setting: index for index, setting in enumerate(study.order())}
    rows.sort(
        key=lambda record: (
            order.get((record["method"], record["label"]), len(order)),
            record["seed"],
        )
    )
    plots = plot(settings_of(rows, times), out, study.name)
    with replacing(out / f"{study.name}.md") as text:
        text.write(
            markdown(
                rows, times, study.reference, [path.with_suffix(".svg").name for path in plots]
            )
        )
    log(f"{out / study.name}.md, with {', '.join(path.name for path in plots)}")


class _Work:
    """The remaining work of a study; its constructor raises all errors of the settings."""

    def __init__(
        self,
        study: Study,
        results: Path,
        speeds: Path,
        folder: Path,
        skip_impossible: bool,
        device: str,
        log: Log,
    ) -> None:
        self.study, self.results, self.speeds, self.folder = study, results, speeds, folder
        self.device, self.log = torch.device(device), log
        points, reasons = study.candidates()
        base = load_eval_model(study.model, study.task, to_dict(Unreduced()), device=device)
        self.examples = _examples(study, base.collator.task)
        points = _fitting(base, points, self.examples[:_TRIED], reasons)
        _refuse([] if skip_impossible else reasons)
        self.timed = self.examples[: study.timed]
        self.base = base.on(self.timed, study.batch_size)
        self.macs = _try(study, points, self.examples[:_TRIED], reasons, self.device)
        _refuse([] if skip_impossible else reasons)
        for reason in reasons:
            log(f"left out: {reason}")
        self.points = [point for point in points if point.setting in self.macs]
        self.expected = self._expected(self.look())
        log(
            f"{study.name}: {len(self.points)} points, {len(self.points) - len(self.left)} of them "
            f"done; about {in_words(sum(self.expected.values()))} to go"
        )

    def look(self) -> list[dict[str, Any]]:
        """Update the remaining work from the files; returns the existing results."""
        rows = read_rows(self.results, self.study.name, self.points)
        check_machine(self.results, rows, self.device, ("gpu",))
        done = {record["id"] for record in rows}
        timed_settings = {
            record["setting"] for record in read_speeds(self.speeds, self.study.name, self.points)
        }
        self.left = [point for point in self.points if point.id not in done]
        self.untimed: list[Point] = []
        self.gone: list[Point] = []
        for name in [name for name in self.macs if name not in timed_settings]:
            seeds = [point for point in self.points if point.setting == name]
            timeable = [
                point
                for point in seeds
                if not _by_weights(point) or point.id not in done or self._model(point).is_dir()
            ]
            (self.untimed if timeable else self.gone).append((timeable or seeds)[0])
        return rows

    def plan(self) -> str:
        """A table of every setting and its FLOPs ratio to the unreduced model."""
        settings = {point.setting: point for point in self.points}
        full_macs = self.macs[self.points[0].setting]
        table = [("method", "setting", "x fewer FLOPs", "seeds")]
        for name, point in settings.items():
            seeds = sum(other.setting == name for other in self.points)
            table.append(
                (point.method, point.label, f"{full_macs / self.macs[name]:.2f}", str(seeds))
            )
        return "\n".join(align(table, left=2))

    def score(self, keep_models: bool) -> None:
        """Train and score the remaining points; other processes may work on other points."""
        announced = False
        while self.left:
            for point in tracked(self.left, self.expected):
                with claimed(self.folder / point.id) as lock:
                    self.look()  # another process may have finished it meanwhile
                    if lock is not None and point in self.left:
                        self._score(point, lock, keep_models)
            self.look()
            if self.left:
                if not announced:
                    self.log(f"other processes are at the last {len(self.left)} points")
                    announced = True
                time.sleep(_POLL)

    def _score(self, point: Point, lock: IO[str], keep_models: bool) -> None:
        """Train and score a locked point."""
        study = self.study
        start = time.perf_counter()
        if point.recipe is not None:
            recipe = self._sharing(point.recipe)
            train_point(recipe, self.folder / point.id, study.processes, lock)
        trained = time.perf_counter() - start
        if point.recipe is not None:
            eval_model = load_eval_model(str(self._model(point)), study.task, device=self.device)
            eval_model = replace(
                eval_model, collator=replace(eval_model.collator, blind=point.recipe.get("blind"))
            )
        else:
            eval_model = load_eval_model(
                study.model, study.task, point.reducer, point.image_size, self.device
            )
        eval_model = eval_model.on(self.timed, study.batch_size)
        measured = score(eval_model, self.examples, study.batch_size) | cost(
            eval_model, self.base, len(self.timed)
        )
        measured["train_seconds"] = "" if point.recipe is None else round(trained, 1)
        measured["seconds"] = round(time.perf_counter() - start, 1)
        with locked(self.folder, wait=math.inf):
            append_rows(self.results, [row(study, point, COLUMNS, measured, self.device)])
        self.log(f"{point}: {measured['accuracy']:.1f} %, in {in_words(measured['seconds'])}")
        if keep_models or (point in self.untimed and _by_weights(point)):
            for checkpoint in self._model(point).parent.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        else:
            shutil.rmtree(self.folder / point.id, ignore_errors=True)

    def time(self, keep_models: bool) -> None:
        """Time every setting without a speed, alternating with the unreduced model."""
        study = self.study
        with locked(self.folder, wait=math.inf), progress_bars() as progress:
            for file in (self.results, self.speeds):
                mend_rows(file)
            self.look()  # again: another process may have timed them meanwhile
            if self.untimed:
                check_machine(
                    self.speeds,
                    read_speeds(self.speeds, study.name),
                    self.device,
                    ("gpu", "cpu", "threads"),
                )
            for point in progress.track(self.untimed, description="timing"):
                if _by_weights(point):
                    eval_model = load_eval_model(
                        str(self._model(point)), study.task, device=self.device
                    )
                else:
                    eval_model = load_eval_model(
                        study.model, study.task, point.reducer, point.image_size, self.device
                    )
                eval_model = eval_model.on(self.timed, study.batch_size)
                measured = speed(eval_model, self.base, len(self.timed), study.runs)
                append_rows(self.speeds, [row(study, point, SPEED_COLUMNS, measured, self.device)])
            if not keep_models:
                for name in ("teacher", *(point.id for point in self.points)):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            if self.gone:
                self.log(
                    f"not timed: {'; '.join(map(str, self.gone))}. Their speeds are those of their "
                    "weights, which are gone. To train them again take their lines out of "
                    f"{self.results}; keep_models keeps the weights"
                )

    def _sharing(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with a cache of the teacher's logits that all points share, where possible."""
        alone = uncached(
            self.base.model, self.base.collator.task, recipe.get("augment"), recipe.get("grounding")
        )
        if alone or not recipe.get("distill"):
            return recipe
        return recipe | {"distill": {"cache": str(self.folder / "teacher"), **recipe["distill"]}}

    def _model(self, point: Point) -> Path:
        return self.folder / point.id / "training" / "model"

    def _expected(self, done: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Estimated seconds of the remaining work, by point id and by setting to time.

        From finished points, or from one training step and one run.
        """
        once = alternate({"base": self.base.run}, runs=2, warmup=1, device=self.device)[
            "base"
        ].median
        took: dict[bool, list[float]] = {True: [], False: []}
        for record in done:
            took[bool(record["training"])].append(record["seconds"])
        training: dict[str, float] = {}
        expected = {}
        for point in self.left:
            trained = point.recipe is not None
            if took[trained]:
                expected[point.id] = statistics.mean(took[trained])
                continue
            if trained and point.method not in training:
                training[point.method] = expected_seconds(
                    point, self.base, self.examples, self.study.processes
                )
            scored = once * (len(self.examples) / len(self.timed) + 4)
            expected[point.id] = scored + training.get(point.method, 0.0)
        return expected | {
            point.setting: once * (2 * self.study.runs + 8) for point in self.untimed
        }


def _by_weights(point: Point) -> bool:
    """Whether the speed depends on the trained weights, because these decide how many tokens are
    kept."""
    return point.recipe is not None and from_dict(point.reducer).traits.dynamic_length


def _examples(study: Study, task: Task) -> list[Example]:
    """The examples to score, in memory except for images in files."""
    every = task.examples(study.split)
    count = len(every) if study.examples is None else study.examples
    if not 0 < count <= len(every):
        raise ValueError(f"{study.split} has {len(every)} examples, not {count}")
    return take(every, range(count))


def _refuse(reasons: Sequence[str]) -> None:
    """Raise ValueError if there are impossible settings."""
    if reasons:
        raise ValueError(
            "\n".join(
                [f"{len(reasons)} impossible settings; skip_impossible leaves them out:", *reasons]
            )
        )


def _fitting(
    base: EvalModel, points: Sequence[Point], examples: Sequence[Example], reasons: list[str]
) -> list[Point]:
    """The points whose reducer and image size fit the model, without a forward; appends the others
    to `reasons`."""
    impossible: dict[str, str] = {}
    patch = getattr(base.model.config, "patch_size", 0)
    for point in {point.setting: point for point in points}.values():
        try:
            with pumer.reduced(base.model, from_dict(point.reducer)):
                sized(base.collator, point.image_size)(examples)
            if (point.image_size or patch) < patch:
                raise ValueError(f"a patch has {patch} pixels a side: give as many or more")
        except (ValueError, TypeError) as error:
            impossible[point.setting] = f"{point.method}, {point.label}: {error}"
    reasons += impossible.values()
    return [point for point in points if point.setting not in impossible]


def _try(
    study: Study,
    points: Sequence[Point],
    examples: Sequence[Example],
    reasons: list[str],
    device: torch.device,
) -> dict[str, int]:
    """MACs of every setting that fits the model; appends the others to `reasons`."""
    costs: dict[str, int] = {}
    for point in {point.setting: point for point in points}.values():
        try:
            eval_model = load_eval_model(
                study.model, study.task, point.reducer, point.image_size, device
            )
            costs[point.setting], _ = macs(eval_model.on(examples, len(examples)), len(examples))
        except (ValueError, TypeError, RuntimeError) as error:
            reasons.append(f"{point.method}, {point.label}: {error}")
    return costs
