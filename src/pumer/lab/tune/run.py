"""Tune a reducer: from a model, examples and a bound to a preset, the evidence and a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

import pumer
from pumer._files import check_folder, is_empty, locked, replacing
from pumer.lab.bench import records
from pumer.lab.bench.latency import LatencyModel, calibrate, measure, planned
from pumer.lab.bench.memory import weight_bytes
from pumer.lab.bench.run import FUSED
from pumer.lab.evaluate import model_inputs
from pumer.lab.progress import Log, no_log
from pumer.lab.tasks.base import Collator, Example
from pumer.lab.tasks.prompts import is_generative
from pumer.lab.tune.evidence import evidence_rows, nearest_point, write_rows
from pumer.lab.tune.examples import ExamplePool
from pumer.lab.tune.plot import plot
from pumer.lab.tune.points import Bounds, Planned, check_reachable, peak_memory, plan
from pumer.lab.tune.search import Search, Verdict
from pumer.lab.tune.sequential import PairedDrop
from pumer.lab.tune.space import SearchGrid, space
from pumer.reducers import to_dict

PRESET, EVIDENCE, STUDY = "reducer.yaml", "candidates.csv", "study.log"
_FEWEST = 8  # batches to choose on and to check on, together
_RUNS = 7  # timed forwards of the point that is accepted


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`.

    Args:
        point: the settings with their predictions.
        judged: verdict on the examples it was chosen on.
        checked: verdict on fresh examples.
        speedup: measured.
        memory: measured bytes of weights and peak activations of a forward.
        points: number of points in the grid.
        predictions: number of examples predicted, including those of the unreduced model.
        rows: the evidence: a verdict on every point, or why it was not judged.
    """

    point: Planned
    judged: Verdict
    checked: Verdict
    speedup: float
    memory: int
    points: int
    predictions: int
    rows: list[dict[str, Any]]


def tune(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    bounds: Bounds,
    out: str | Path,
    *,
    grid: SearchGrid | None = None,
    skip_impossible: bool = False,
    batch_size: int = 32,
    choose: int = 2000,
    check: int = 8000,
    alpha: float = 0.1,
    trials: int = 80,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    log: Log = no_log,
) -> Tuned:
    """Search the best setting of PuMer or ToMe within bounds, and write it to a folder.

    With a bound on the drop, the best is the fastest point that keeps it; otherwise the one that
    loses least.

    Args:
        model: unreduced, on its device.
        examples: of a labelled split.
        collator: the task's, with the model's transforms.
        bounds: that the setting must keep.
        out: folder for the preset, the evidence, the plot and the study; new or empty unless
            `resume`.
        grid: values of each setting.
        skip_impossible: skip settings that the model does not support, instead of refusing them.
        batch_size: examples at a time: what speed and memory are for.
        choose: examples to choose on; with fewer examples both shares shrink alike.
        check: fresh examples to check the choice on.
        alpha: probability of accepting a point that loses more than the bound.
        trials: points to judge at most.
        seed: of the order of the examples and of the search.
        resume: go on with the study in `out`.
        settings: origin of model and examples, to recognise a study by.
        log: called with a line at every decision.

    Raises:
        ValueError: for impossible settings, too few examples, a folder that is not empty or of
            another study, and for a bound that no point keeps, naming the nearest one; the
            evidence is still written.
    """
    folder = Path(out)
    check_folder(folder)
    if not is_empty(folder) and not resume:
        raise ValueError(
            f"{folder} is not empty: give another --out, or --resume true to go on with its study"
        )
    for name, count in (
        ("batch_size", batch_size),
        ("choose", choose),
        ("check", check),
        ("trials", trials),
    ):
        if count < 1:
            raise ValueError(f"--{name} is a whole number from 1, not {count}")
    if not 0 < alpha < 1:
        raise ValueError(f"--alpha is a probability, more than 0 and less than 1, not {alpha}")
    points = space(grid or SearchGrid(), model, skip_impossible or grid is None)
    pool = ExamplePool(examples, collator, batch_size, choose + check, seed)
    race, total = _shares(pool.available, choose, check, batch_size)
    where = records.environment(next(model.parameters()).device)
    described = {
        **(settings or {}),
        "machine": {name: where[name] for name in ("cpu", "threads", "gpu")},
        "bounds": vars(bounds),
        "axes": points.axes,
        "choose": race * batch_size,
        "check": (total - race) * batch_size,
        "batch_size": batch_size,
        "alpha": alpha,
        "seed": seed,
    }
    described = json.loads(json.dumps(described))
    journal = folder / STUDY
    with ExitStack() as alone:
        study = None
        if journal.exists():
            alone.enter_context(locked(folder, wait=0.0))
            study = _open(journal, described)
        pool.size(1)
        inputs = _timed_inputs(model, pool.inputs(0))
        log("timing a few forwards")
        costs = study.user_attrs.get("latency") if study else None
        latency = LatencyModel(costs) if costs else calibrate(model, inputs)
        with pumer.reduced(model, pumer.Unreduced()), torch.inference_mode():
            model(**inputs)
            base = planned(model, model)
        log(f"planning {len(points.points)} points")
        predicted = plan(model, points.points, latency, base, inputs, bounds.memory is not None)
        check_reachable(predicted, bounds)
        if study is None:  # nothing is written before it is known that there is something to search
            alone.enter_context(locked(folder, wait=0.0))
            study = _open(journal, described)
        study.set_user_attr("latency", dict(latency.costs))
        search = Search(
            model,
            points,
            predicted,
            bounds,
            pool,
            race,
            total - race,
            study,
            alpha,
            trials,
            seed,
            log,
        )
        best, speedup, memory = _settle(search, inputs, log)
        rows = evidence_rows(search, study, best)
        write_rows(folder / EVIDENCE, rows)
        plot(rows, bounds.drop, folder / "tune")
        if best is None:
            raise ValueError(nearest_point(search))
        with replacing(folder / PRESET) as file:
            yaml.safe_dump(
                json.loads(json.dumps(to_dict(best.point.reducer))), file, sort_keys=False
            )
    name = best.point.name
    return Tuned(
        best,
        search.judged[name],
        search.checked[name],
        speedup,
        memory,
        len(predicted),
        search.predictions,
        rows,
    )


def lost(
    base: nn.Module,
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    batch_size: int,
    choose: int,
    check: int,
    alpha: float,
    seed: int,
) -> PairedDrop:
    """Loss of another model against the unreduced one on the examples that `tune` checks on."""
    pool = ExamplePool(examples, collator, batch_size, choose + check, seed)
    race, total = _shares(pool.available, choose, check, batch_size)
    batches = range(race, total)
    test = PairedDrop(alpha)
    with pumer.reduced(base, pumer.Unreduced()):
        before = list(pool.scores(base, batches))
    for stock_scores, scores in zip(before, pool.scores(model, batches), strict=True):
        test.update(a - b for a, b in zip(stock_scores, scores, strict=True))
    return test


def _shares(examples: int, choose: int, check: int, batch_size: int) -> tuple[int, int]:
    """Number of batches to choose on, and in total; raises ValueError for too few."""
    total = min(choose + check, examples) // batch_size
    if total < _FEWEST or min(choose, check) < 1:
        raise ValueError(
            f"{min(choose + check, examples)} examples, at most one per image, are too few "
            f"to choose and to check on: give {_FEWEST * batch_size} or more, or a smaller "
            "--batch_size"
        )
    return min(max(1, total * choose // (choose + check)), total - 1), total


def _open(journal: Path, described: dict[str, Any]) -> optuna.Study:
    """Open or create the study in a file; raises ValueError for one of other settings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for left_over in journal.parent.glob(f"{journal.name}.lock*"):
        left_over.unlink()  # optuna's lock, for which it would wait; the folder is locked already
    if journal.is_file():  # a kill may have cut off what was written last
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    study = optuna.create_study(
        storage=JournalStorage(
            JournalFileBackend(str(journal.resolve()))
        ),  # its lock is a link to this path
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
    )
    stored = study.user_attrs.get("settings")
    if stored is None:
        study.set_user_attr("settings", described)
    elif stored != described:
        other = sorted(
            name
            for name in stored.keys() | described.keys()
            if stored.get(name) != described.get(name)
        )
        raise ValueError(
            f"the study in {journal.parent} is of another {', '.join(other)}: give another --out"
        )
    return study


def _timed_inputs(model: nn.Module, collated: dict[str, Any]) -> dict[str, Any]:
    """A batch for the measurements; ranked texts are each paired with their image.

    For generative models the prefill is measured, up to the first token of the answer.
    """
    inputs, texts = (
        model_inputs(collated, next(model.parameters()).device),
        collated.get("texts_per_image", 1),
    )
    if is_generative(model):
        return inputs | {"logits_to_keep": 1}
    if texts == 1:
        return inputs
    return inputs | {
        name: inputs[name].repeat_interleave(texts, 0) for name in ("pixel_values", "pixel_mask")
    }


def _settle(
    search: Search, inputs: Mapping[str, Any], log: Log
) -> tuple[Planned | None, float, int]:
    """The best point that passes its check and keeps its bounds when measured, with its speed-up
    and memory."""
    while (best := search.run()) is not None:
        name, model, bounds = best.point.name, search.model, search.bounds
        verdict = search.verify(best)
        log(
            f"checked {name}: loses {verdict.drop:.2f} ({verdict.low:.2f} to {verdict.high:.2f}) "
            f"on {verdict.examples} fresh examples, {verdict.status}"
        )
        if verdict.status != "accepted":
            continue
        measured = search.study.user_attrs.get(f"measured/{name}")
        if measured is None:
            seconds, _ = measure(model, inputs, {name: best.point.reducer}, _RUNS)
            with pumer.reduced(model, best.point.reducer):
                memory = weight_bytes(model) + peak_memory(model, inputs)
            measured = [seconds[FUSED] / seconds[name], memory]
            search.study.set_user_attr(f"measured/{name}", measured)
        speedup, memory = measured
        log(f"measured {name}: {speedup:.2f}x, {memory / 1e6:.0f} MB")
        if (bounds.speedup is None or speedup >= bounds.speedup) and (
            bounds.memory is None or memory <= bounds.memory
        ):
            return best, speedup, memory
        search.correct(best, speedup, memory)
    return None, 0.0, 0
