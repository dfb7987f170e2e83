"""Studies: points and their ids, results in files, differences and curves, the whole on a tiny
model, killed too."""

import csv
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViltConfig, ViltForQuestionAnswering

import pumer
from pumer._files import claimed, locked
from pumer.cli import main
from pumer.costs.report import last_forward_parts
from pumer.lab.data.images import Square
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.study import read_study, run
from pumer.lab.study.curves import (
    Interpolated,
    difference,
    half_width,
    interpolate,
    on_curve,
    pareto,
    seed_spreads,
    settings_of,
)
from pumer.lab.study.evaluation import EvalModel, _tokens, cost, load_eval_model, macs
from pumer.lab.study.plots import plot
from pumer.lab.study.results import (
    COLUMNS,
    FIGURES,
    SPEED_FIGURES,
    pack_scores,
    read_rows,
    unpack_scores,
)
from pumer.lab.study.tables import markdown
from pumer.lab.train import launch as train_launch

study_run = importlib.import_module(
    "pumer.lab.study.run"
)  # the package has a function of that name
TASK = {"name": "scenes", "questions": 24, "image_size": 32, "seed": 5}
TRAINER = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
TRAINER |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
TRAIN = {
    "task": TASK | {"seed": 0},
    "distill": {"weight": 1.0},
    "image": {"kind": "square", "size": 32},
}
TRAIN |= {"eval_split": None, "trainer": TRAINER}
PUMER = {"reducer": "pumer", "prune": 0.2, "layers": [0, 1]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model as `pumer train` would leave it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = train_tokenizer(
        [example.text for example in Scenes(questions=300, image_size=32).examples("train")], 150
    )
    names = dict(enumerate(Scenes().labels))
    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=150,
        max_position_embeddings=24,
        image_size=32,
        patch_size=8,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        initializer_range=0.3,
    )
    pumer.save(ViltForQuestionAnswering(config), folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    save_transform(Square(32), folder)
    return str(folder)


@pytest.fixture
def study(model, tmp_path, monkeypatch):
    """Writes the file of a tiny study and reads it; nothing is plotted, which takes seconds."""
    monkeypatch.setattr(study_run, "plot", lambda *_: [])

    def write(**changes):
        settings = {
            "name": "tiny",
            "model": model,
            "task": TASK,
            "methods": [{"name": "PuMer", "reducer": PUMER}],
            "batch_size": 4,
            "timed": 8,
            "runs": 1,
        } | changes
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        return read_study(file)

    return write


def in_this_process(words, processes, log, lock):
    """In place of `launch`."""
    assert main(words) == 0


# --- points ---


def test_points_are_all_combinations_and_the_unreduced_model(study):
    method = {"name": "PuMer", "reducer": PUMER, "grid": {"prune": [0.1, 0.2], "merge": [0.2, 0.3]}}
    points, wrong = study(methods=[method], train=TRAIN, seeds=[1, 2]).candidates()
    assert not wrong
    assert len(points) == 2 * (1 + 4)
    assert [point.seed for point in points] == [1] * 5 + [2] * 5
    assert points[0].method == "unreduced"
    assert {(p.reducer["prune"], p.reducer["merge"]) for p in points[1:5]} == {
        (0.1, 0.2),
        (0.1, 0.3),
        (0.2, 0.2),
        (0.2, 0.3),
    }
    assert len({point.id for point in points}) == 10
    assert len({point.setting for point in points}) == 5
    assert points[1].label == "prune 0.1, merge 0.2"


def test_an_id_is_of_what_matters_and_of_nothing_else(study):
    def ids(**changes):
        return [point.id for point in study(**changes).candidates()[0]]

    base = ids(train=TRAIN)
    assert ids(train=TRAIN, name="other", runs=3) == base
    assert ids(train=TRAIN | {"trainer": TRAINER | {"save_steps": 5}}) == base
    assert ids(train=TRAIN | {"distill": {"weight": 1.0, "cache": "somewhere"}}) == base
    assert (
        ids(train=TRAIN, methods=[{"name": "renamed", "reducer": dict(reversed(PUMER.items()))}])
        == base
    )
    for changes in (
        {"train": TRAIN | {"trainer": TRAINER | {"learning_rate": 1e-4}}},
        {"train": TRAIN, "seeds": [2]},
        {"train": TRAIN, "processes": 1},
        {"train": TRAIN, "examples": 12},
        {"train": TRAIN | {"distill": None}},
        {},
    ):
        assert not set(ids(**changes)) & set(base)


def test_a_method_changes_the_training(study):
    methods = [
        {"name": "PuMer", "reducer": PUMER},
        {"name": "alone", "reducer": PUMER, "train": {"distill": None}},
        {"name": "untrained", "reducer": PUMER, "train": False},
        {"name": "smaller", "reducer": "none", "points": [{"image_size": 16}]},
    ]
    points, _ = study(methods=methods, train=TRAIN).candidates()
    unreduced, pumered, alone, untrained, smaller = points
    assert unreduced.recipe["distill"]["teacher"] == unreduced.recipe["model"]["path"]
    assert pumered.recipe["reducer"] == pumered.reducer
    assert alone.recipe["distill"] is None
    assert untrained.recipe is None
    assert (smaller.recipe["image"]["size"], pumered.recipe["image"]["size"]) == (16, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{"name": "a"}]}, "reducer"),
        (
            {
                "methods": [
                    {"name": "a", "reducer": "tome", "points": [{"r": 1}], "grid": {"r": [1]}}
                ]
            },
            "not both",
        ),
        ({"methods": [{"name": "a", "reducer": "tome", "colour": 1}]}, "colour"),
        (
            {"methods": [{"name": "a", "reducer": "tome", "points": []}]},
            "a: points, or the values of a grid, are empty",
        ),
        ({"methods": [{"name": "a", "reducer": "tome", "grid": {"r": []}}]}, "are empty"),
        (
            {"methods": [{"name": "a", "reducer": "tome", "grid": {"r": 3}}]},
            "methods.*list.*Got value: 3",
        ),
        (
            {"methods": [{"name": "a", "reducer": "tome", "grid": {"score": "qk"}}]},
            "methods.*list.*Got value: qk",
        ),
        ({"methods": [{"name": "a", "reducer": "tome", "points": {}}]}, "methods.*list"),
        ({"methods": [{"name": "a", "reducer": 3}]}, "methods.*Given value: 3"),
        ({"methods": ["tome"]}, "methods.*dict.*Got value: tome"),
        ({"methods": None}, "methods"),
        ({"seeds": 1}, "seeds.*Got value: 1"),
        ({"examples": "all"}, "examples.*Given value: all"),
        ({"train": "scenes-pumer"}, "train.*dict.*scenes-pumer"),
        ({"baseline": []}, "baseline"),
        ({"methods": [{"name": "unreduced", "reducer": "tome"}]}, "names of their own"),
        ({"reference": "nothing"}, "none of the methods"),
        ({"seeds": [1, 2]}, "a seed changes nothing"),
        ({"colour": "red"}, "unknown"),
        ({"runs": 0}, "runs: give at least 1"),
        ({"methods": [{"name": "a", "reducer": "tome", "train": {"seed": 1}}]}, "has no train"),
    ],
)
def test_a_bad_study_is_refused(study, changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        study(**changes)


def test_sizes_that_are_none_are_named(study):
    points = [{"image_size": size} for size in (3, "big", 0)]
    one = study(methods=[{"name": "smaller", "reducer": "none", "points": points}])
    wrong = one.candidates()[1]
    assert [text.partition(": ")[2] for text in wrong] == [
        "image_size is a number of pixels, not 'big'",
        "image_size is a number of pixels, not 0",
    ]
    with pytest.raises(
        ValueError, match=r"(?s)3 impossible settings.*smaller, image_size 3: "
    ):  # less than a patch
        run(one, "out", only="plan")


def test_bad_trainings_and_equal_points_are_refused(study):
    with pytest.raises(ValueError, match="no setting colour"):
        study(train=TRAIN | {"colour": 1}).candidates()
    with pytest.raises(ValueError, match="no file"):
        study(train={"recipe": "nothing"}).candidates()
    same = [{"name": name, "reducer": PUMER} for name in "ab"]
    with pytest.raises(ValueError, match="the same point"):
        study(methods=same).candidates()


# --- results ---


def number_row(line, accuracy):
    """A line of the results with another accuracy."""
    values = next(csv.reader([line]))
    values[COLUMNS.index("accuracy")] = accuracy
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def made(method, x, scores, seed=1, label="", macs=1.0):
    """A row of the results and one of the speeds."""
    row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(FIGURES, 1.0)
    name = f"{method}{x}{label}"
    row |= {
        "id": f"{name}{seed}",
        "setting": name,
        "study": "tiny",
        "method": method,
        "label": label,
        "seed": seed,
    }
    row |= {
        "accuracy": 100 * float(np.mean(scores)),
        "gflops": macs,
        "unreduced_gflops": 1.0,
        "date": "2026-01-01",
    }
    row |= {
        "training": "{}",
        "gflops_towers": 0.0,
        "image_spread": 0.0,
        "scores": pack_scores(scores, range(len(scores))),
    }
    speed = dict.fromkeys(SPEED_FIGURES, x) | {"setting": name, "overhead": 0.1, "runs": "9"}
    return row, speed | {
        name: row[name]
        for name in ("date", "cpu", "cores", "threads", "gpu", "torch", "transformers")
    }


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5)), min_size=1, max_size=30))
def test_scores_come_back_from_their_text(pairs):
    scores, clusters = [score / 100 for score, _ in pairs], [cluster for _, cluster in pairs]
    sums, counts = unpack_scores(pack_scores(scores, clusters))
    names = list(dict.fromkeys(clusters))
    for number, name in enumerate(names):
        mine = [score for score, cluster in zip(scores, clusters, strict=True) if cluster == name]
        assert counts[number] == len(mine)
        assert sums[number] == pytest.approx(sum(mine), abs=1e-9)


def test_intervals_are_those_of_a_bootstrap_over_clusters():
    rng = np.random.default_rng(0)
    one, other = (
        settings_of([made(name, 1, list(rng.random(300) < p))[0]])[0]
        for name, p in (("a", 0.8), ("b", 0.7))
    )
    apart = one.scores - other.scores
    drawn = [100 * apart[rng.integers(300, size=300)].mean() for _ in range(4000)]
    found = difference(on_curve(one), on_curve(other), {})
    assert found.value == pytest.approx(100 * apart.mean())
    assert found.half_width == pytest.approx(1.96 * np.std(drawn), rel=0.05)
    assert half_width(one, {}) == pytest.approx(
        196 * np.sqrt(one.accuracy / 100 * (1 - one.accuracy / 100) / 300), rel=0.01
    )


def test_seeds_widen_the_interval():
    accuracies = (0.5, 0.6, 0.7)
    rows = [
        made("a", 1, [1] * round(10 * p) + [0] * round(10 * (1 - p)), seed)[0]
        for seed, p in enumerate(accuracies)
    ]
    (setting,) = settings_of(rows)
    spreads = seed_spreads([setting])
    spread = spreads["a"]
    assert spread.variance == pytest.approx(np.var([50, 60, 70], ddof=1))
    assert spread.freedom == 2
    assert setting.accuracy == pytest.approx(60)
    drawn = (
        half_width(setting, {}) / 2.262
    ) ** 2  # the quantile of Student's t for nine degrees of freedom
    known = (drawn + 100 / 3) ** 2 / (drawn**2 / 9 + (100 / 3) ** 2 / 2)
    quantile = scipy.stats.t.ppf(0.975, known)
    assert half_width(setting, spreads) == pytest.approx(
        quantile * np.sqrt(drawn + 100 / 3), rel=1e-3
    )
    assert seed_spreads(settings_of(rows[:1])) == {}
    untrained = settings_of([rows[0] | {"training": ""}])[0]
    assert half_width(untrained, spreads) == half_width(untrained, {})


@pytest.mark.parametrize(("settings", "seeds"), [(2, 2), (3, 2), (2, 3), (10, 3)])
def test_intervals_hold_with_few_seeds(settings, seeds):
    """95 of 100 of them have the truth, where all that is left to chance is the seed."""
    rng, held = np.random.default_rng(0), 0
    made_rows = [
        [made("a", number, [0.5] * 4, seed)[0] for seed in range(seeds)]
        for number in range(settings)
    ]
    for _ in range(2000):
        accuracies = 50 + 5 * rng.standard_normal((settings, seeds))
        rows = [
            row | {"accuracy": accuracy}
            for group, drawn in zip(made_rows, accuracies, strict=True)
            for row, accuracy in zip(group, drawn, strict=True)
        ]
        found = settings_of(rows)
        held += abs(accuracies[0].mean() - 50) <= half_width(found[0], seed_spreads(found))
    assert 0.935 < held / 2000 < 0.965


def test_every_method_has_the_spread_of_its_own_seeds():
    """Those of one setting have one together, and where there is one seed it is that of the
    study."""
    accuracies = {
        "a": [(50, 52), (60, 64)],
        "b": [(50, 51), (60, 60)],
        "c": [(50, 58)],
        "d": [(70, 72)],
        "e": [(9,), (8,)],
    }
    rows = [
        made(method, number, [0.5] * 4, seed)[0] | {"accuracy": accuracy}
        for method, groups in accuracies.items()
        for number, group in enumerate(groups)
        for seed, accuracy in enumerate(group)
    ]
    found = settings_of(rows)
    spreads = seed_spreads(found)
    assert {name: (spread.variance, spread.freedom) for name, spread in spreads.items()} == {
        "a": (pytest.approx((2 + 8) / 2), 2),
        "b": (pytest.approx(0.5 / 2), 2),
        "c": (pytest.approx((32 + 2) / 2), 2),
        "d": (pytest.approx((32 + 2) / 2), 2),
        "e": (pytest.approx((2 + 8 + 0.5 + 32 + 2) / 6), 6),
    }
    one, two, other = found[0], found[1], found[2]
    between = Interpolated(((one, 0.5), (two, 0.5)))
    # Two settings by one estimate add up before their degrees of freedom are counted, those of two
    # methods do not.
    for apart, variances in ((between, [(5 / 2 * 0.5, 2)]), (on_curve(one), [(5 / 2, 2)])):
        known = [*variances, (0.25 / 2, 2)]
        whole = sum(variance for variance, _ in known)
        freedom = whole**2 / sum(variance**2 / number for variance, number in known)
        wanted = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(whole)
        assert difference(apart, on_curve(other), spreads).half_width == pytest.approx(wanted)


def test_a_speed_that_is_not_known_well_widens_the_interval():
    """A slope of 40 points per unit of speed, a median that is off by 0.1: another four points."""
    pairs = [made("a", x, [1] * n + [0] * (1000 - n)) for x, n in ((1.0, 900), (2.0, 500))]
    speeds = [
        speed | {"x_low": x - 0.2, "x_high": x + 0.2}
        for (_, speed), x in zip(pairs, (1.0, 2.0), strict=True)
    ]
    curve = settings_of([row for row, _ in pairs], speeds)
    error = curve[0].speed_up_error
    medians = [
        np.median(draw) for draw in np.random.default_rng(0).normal(0, 0.4 / 1.683, (20000, 9))
    ]
    assert error == pytest.approx(np.std(medians), rel=0.05)
    for where, share in ((1.0, 1.0), (1.5, 0.5), (2.0, 1.0)):
        exact, known = (
            interpolate(curve, lambda setting: setting.speed_up, where, axis)
            for axis in (None, lambda setting: setting.speed_up_error)
        )
        ends = 2 if where == 1.5 else 1
        assert exact.placing == ()
        assert known.placing == ((pytest.approx((40 * error * share) ** 2), 4.0),) * ends
        narrow, wide = (
            difference(one, on_curve(curve[0]), {}).half_width for one in (exact, known)
        )
        variances = [(narrow / 1.962) ** 2, *(variance for variance, _ in known.placing)]
        freedom = sum(variances) ** 2 / sum(
            x**2 / y for x, y in zip(variances, (999, 4, 4), strict=False)
        )
        assert wide == pytest.approx(
            scipy.stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances)), rel=1e-3
        )


@pytest.mark.parametrize("runs", [3, 5, 9, 15])
def test_intervals_hold_with_few_rounds(runs):
    """95 of 100 of them, or more, have the truth, where all that is left to chance is the speed of
    the settings."""
    rng, held = np.random.default_rng(0), 0
    made_pairs = [made("a", x, [n] * 4) for x, n in ((1.0, 0.9), (2.0, 0.5))]
    rows = [row for row, _ in made_pairs]
    for _ in range(1500):
        speeds = []
        for (_, speed), x in zip(made_pairs, (1.0, 2.0), strict=True):
            gains = rng.normal(x, 0.05, runs)
            low, high = np.quantile(gains, [0.2, 0.8])
            speeds.append(
                speed
                | {"x_unreduced": np.median(gains), "x_low": low, "x_high": high, "runs": runs}
            )
        found = interpolate(
            settings_of(rows, speeds),
            lambda setting: setting.speed_up,
            1.5,
            lambda setting: setting.speed_up_error,
        )
        truth = on_curve(settings_of([made("b", 1.5, [0.7] * 4)[0]])[0])
        apart = difference(found, truth, {})
        held += abs(apart.value) <= apart.half_width
    assert 0.94 < held / 1500 <= 1.0


def test_a_curve_is_straight_between_its_settings_and_nothing_beyond():
    rows, speeds = zip(
        *(made("a", x, [1] * n + [0] * (10 - n)) for x, n in ((1.2, 9), (2.0, 5))), strict=True
    )
    curve = settings_of(rows, speeds)
    between = interpolate(curve, lambda setting: setting.speed_up, 1.4)
    assert between.scores.sum() == pytest.approx(0.75 * 9 + 0.25 * 5)
    assert interpolate(curve, lambda setting: setting.speed_up, 1.1) is None
    assert interpolate(settings_of(rows), lambda setting: setting.speed_up, 1.6) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    def beaten(x, y):
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    front = pareto(points)
    assert {points[number] for number in front} == {point for point in points if not beaten(*point)}
    assert [points[number][0] for number in front] == sorted(
        {points[number][0] for number in front}
    )


def test_the_tables_say_where_the_reference_is_not_above():
    def curve(method, good):
        return [made(method, x, [1] * n + [0] * (1000 - n), macs=1 / x) for x, n in good]

    pairs = [made("unreduced", 1.0, [1] * 950 + [0] * 50)]
    pairs += curve("PuMer", [(1.2, 930), (1.8, 900)]) + curve(
        "ToMe", [(1.2, 960), (1.5, 930), (1.8, 700)]
    )
    pairs += [made("single", 1.5, [1] * 900 + [0] * 100)]
    text = markdown([row for row, _ in pairs], [speed for _, speed in pairs], ["PuMer", "single"])
    assert "PuMer against ToMe: below at 1.3x, 1.4x, 1.5x; above at 1.6x, 1.7x, 1.8x." in text
    assert "**-1.5 ± " in text
    assert "less single" not in text
    assert "; trained, seeds 1; " in text
    mixed = [row | {"training": "" if row["method"] == "single" else "{}"} for row, _ in pairs]
    assert "; trained but for single, seeds 1; " in markdown(mixed, [])
    assert (
        "| Δ unreduced | Δ single | examples/s |" in text
    )  # settings that stand for a method, which a curve has not
    assert "| 1.80 (1.80 - 1.80) | 2.00 |" in text  # with and without a tenth of overhead
    assert text.count("## PuMer at the same") == 2


def test_foreign_rows_and_columns_are_refused(study, tmp_path):
    one = study()
    run(one, tmp_path / "out", scratch=tmp_path / "runs", log=lambda text: None)
    file = tmp_path / "out" / "tiny.csv"
    good = file.read_text()
    points, _ = one.candidates()
    assert [row["id"] for row in read_rows(file, "tiny", points)] == [point.id for point in points]

    file.write_text(good + good.splitlines()[-1][:40])  # a kill in the middle of a row
    assert len(read_rows(file, "tiny", points)) == 2
    run(one, tmp_path / "out", scratch=tmp_path / "runs", only="plots", log=lambda text: None)
    assert file.read_text() != good  # somebody else may be writing that row
    run(one, tmp_path / "out", scratch=tmp_path / "runs", log=lambda text: None)
    assert file.read_text() == good
    file.write_text(good[:-1])  # an editor left the end of the line out
    assert len(read_rows(file, "tiny", points)) == 2
    run(one, tmp_path / "out", scratch=tmp_path / "runs", log=lambda text: None)
    assert file.read_text() == good
    file.write_text(good.replace("\n", "\n\n"))
    assert len(read_rows(file, "tiny", points)) == 2
    table = (tmp_path / "out" / "tiny.md").read_text()
    heading, *rows = good.splitlines(keepends=True)
    file.write_text("".join([heading, *reversed(rows)]))  # finished in another order
    run(one, tmp_path / "out", scratch=tmp_path / "runs", only="plots", log=lambda text: None)
    assert (tmp_path / "out" / "tiny.md").read_text() == table
    for text, message in (
        (good.replace(points[1].id, "0" * 12).replace(",PuMer,", ",other,"), "line 3, is no point"),
        (good.replace(",PuMer,", ",other,"), "is called 'PuMer' in the study"),
        (good + good.splitlines()[1] + "\n", "line 4, repeats"),
        (good.replace("accuracy_low", "lowest"), "other columns"),
        (good + "a,b\n", "line 4, has 2 columns, not"),
        (good[:-1] + ",more\n", "line 3, has .* columns, not"),
        (
            heading + number_row(rows[0], "n/a") + rows[1],
            "line 2: accuracy is 'n/a', which is no number",
        ),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(one, tmp_path / "out", scratch=tmp_path / "runs", log=lambda text: None)


def test_a_speed_of_weights_that_are_gone_is_left_out(study, tmp_path, monkeypatch):
    said = []
    one, places = study(), {"scratch": tmp_path / "runs", "log": said.append}
    run(one, tmp_path / "out", **places)
    speeds = tmp_path / "out" / "tiny-speed.csv"
    speeds.unlink()
    monkeypatch.setattr(study_run, "_by_weights", lambda point: point.method == "PuMer")
    run(one, tmp_path / "out", **places, only="plan")
    run(one, tmp_path / "out", **places)
    assert any(text.startswith("not timed: PuMer, seed 1. ") for text in said)
    assert (
        sum(re.fullmatch(r"PuMer, seed 1: \d+\.\d %, in \d+ s", text) is not None for text in said)
        == 1
    )
    assert [row["method"] for row in csv.DictReader(speeds.open())] == ["unreduced"]


def test_a_speed_is_of_the_first_seed_whose_weights_are_there(study, tmp_path, monkeypatch):
    monkeypatch.setattr(train_launch, "launch", in_this_process)
    monkeypatch.setattr(study_run, "_by_weights", lambda point: point.method == "PuMer")
    one, out, said = (
        study(train=TRAIN, baseline={"train": False}, seeds=[1, 2], processes=1),
        tmp_path / "out",
        [],
    )
    points = [point for point in one.candidates()[0] if point.method == "PuMer"]
    places = {"scratch": tmp_path / "runs", "log": said.append}
    models = [
        tmp_path / "runs" / "study-tiny" / point.id / "training" / "model" for point in points
    ]
    run(one, out, **places, only="scores")
    assert [model.is_dir() for model in models] == [True, False]
    shutil.rmtree(models[0].parents[1])
    results = out / "tiny.csv"
    results.write_text(
        "".join(line for line in results.open() if not line.startswith(points[1].id))
    )
    run(one, out, **places, only="scores")
    assert [model.is_dir() for model in models] == [False, True]
    run(one, out, **places)
    assert [row["method"] for row in csv.DictReader((out / "tiny-speed.csv").open())] == [
        "unreduced",
        "PuMer",
    ]
    assert not any("not timed" in text for text in said)


def test_rows_of_another_machine_are_not_mixed_with_ours(study, tmp_path, monkeypatch):
    one, places = study(), {"scratch": tmp_path / "runs", "log": lambda text: None}
    run(one, tmp_path / "out", **places)
    results, speeds = tmp_path / "out" / "tiny.csv", tmp_path / "out" / "tiny-speed.csv"
    rows = list(csv.reader(speeds.open()))
    rows[1][rows[0].index("threads")] = "99"
    with speeds.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    run(one, tmp_path / "out", **places)  # nothing is left to time
    with speeds.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(rows[:2])
    with pytest.raises(
        ValueError, match=r"tiny-speed.csv has rows of threads 99; here it is gpu none, "
    ):
        run(one, tmp_path / "out", **places)
    rows = list(csv.reader(results.open()))
    rows[1][rows[0].index("gpu")] = "H100"
    with results.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    with pytest.raises(ValueError, match=r"tiny.csv has rows of gpu H100; here it is gpu none"):
        run(one, tmp_path / "out", **places)


def test_text_in_a_study_stays_text(study):
    one = study(
        task=TASK | {"root": "2017"}, methods=[{"name": "a", "reducer": PUMER, "train": None}]
    )
    assert one.task["root"] == "2017"
    assert study(baseline=None, reference=None).reference == ()


@pytest.mark.parametrize("missing", ["matplotlib", "scipy"])
def test_what_the_tables_need_is_asked_for_at_the_start(study, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"needs {missing}: .*pip install '..study.'"):
        run(study(), tmp_path / "out", scratch=tmp_path / "runs")
    assert not (tmp_path / "out").exists()


# --- measuring ---


@pytest.mark.parametrize(
    "reducer", [PUMER | {"merge": 0.3}, {"reducer": "tome", "r": 3, "depth": 3}]
)
def test_tokens_and_costs_are_those_of_the_report(model, reducer):
    examples = Scenes(questions=8, image_size=32).examples("test")[:]
    base = load_eval_model(model, TASK).on(examples, 4)
    one = load_eval_model(model, TASK, reducer).on(examples, 4)
    mean, spread = _tokens(one)
    lengths = pumer.report(one.model).lengths
    assert mean[:, 1].tolist() == [image for _, image in lengths]
    assert spread[:, 1].max() == 0
    assert mean[0, 0] == pytest.approx(sum(int(b["attention_mask"].sum()) for b in one.batches) / 8)
    alone = [
        _tokens(load_eval_model(model, TASK, reducer).on([example], 1))[0] for example in examples
    ]
    torch.testing.assert_close(torch.tensor(np.mean(alone, axis=0)), torch.tensor(mean))

    found = cost(one, base, 8)
    assert found["gflops"] < found["unreduced_gflops"]
    assert found["gflops_towers"] == 0
    assert cost(base, base, 8)["gflops"] == found["unreduced_gflops"]


def test_a_picture_with_several_texts_is_encoded_once():
    net = pumer.apply(tiny.model("MeterForImageAndTextRetrieval"), pumer.PuMer(layers=(0,)))
    texts = tiny.batch("MeterForImageAndTextRetrieval")
    pictures = {name: texts.pop(name) for name in ("pixel_values", "pixel_mask")}
    once = {**texts, **{name: value[:2] for name, value in pictures.items()}, "texts_per_image": 2}
    whole, towers = macs(EvalModel(net, None, (once,)), 2)
    parts = last_forward_parts(net)
    pictured = parts["embedding"] + parts["vision tower"] + parts["projection"]
    pairs = sum(parts.values()) - pictured
    assert whole == pictured + 2 * pairs
    assert towers == parts["vision tower"] + parts["projection"] + 2 * parts["text encoder"]
    again, _ = macs(EvalModel(net, None, ({**texts, **pictures},)), 2)
    assert again == 2 * (pictured + pairs)


def test_what_was_trained_blind_is_scored_blind(study, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(study_run, "train_point", lambda *_: None)
    monkeypatch.setattr(
        study_run, "score", lambda one, *_: seen.append(one.collator.blind) or {"accuracy": 50.0}
    )
    monkeypatch.setattr(study_run, "cost", lambda *_: {})
    monkeypatch.setattr(study_run, "append_rows", lambda *_: None)
    monkeypatch.setattr(study_run, "row", lambda *_: {})
    one = study(
        train=TRAIN,
        methods=[{"name": "blind", "reducer": PUMER, "train": {"blind": "text"}}],
        processes=1,
    )
    work = study_run._Work(
        one, tmp_path / "a", tmp_path / "b", tmp_path / "runs", False, "cpu", lambda text: None
    )
    monkeypatch.setattr(work, "_model", lambda point: Path(one.model))
    for point in work.left:
        with locked(work.folder / point.id) as lock:
            work._score(point, lock, False)
    assert seen == [None, "text"]


def test_smaller_pictures_cost_less(model):
    examples = Scenes(questions=4, image_size=32).examples("test")[:]
    small = load_eval_model(model, TASK, image_size=16).on(examples, 4)
    assert small.batches[0]["pixel_values"].shape[-1] == 16
    assert _tokens(small)[0][:, 1].tolist() == [5] * 4


# --- the whole ---


@pytest.mark.smoke
def test_without_training(study, tmp_path, capsys, monkeypatch):
    methods = [
        {"name": "PuMer", "reducer": PUMER, "points": [{"prune": 0.1}, {"prune": 0.5}]},
        {"name": "smaller", "reducer": "none", "points": [{"image_size": 16}, {"image_size": 24}]},
    ]
    study(methods=methods, reference=["PuMer", "smaller"])
    words = [
        "study",
        str(tmp_path / "tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--scratch",
        str(tmp_path / "runs"),
    ]
    assert main([*words, "--only", "plan"]) == 0
    assert "0 of them done" in (said := capsys.readouterr().out)
    assert "prune 0.5" in said
    assert not (tmp_path / "out").exists()
    assert main([*words, "--only", "scores"]) == 0
    assert not (tmp_path / "out/tiny-speed.csv").exists()
    assert "| PuMer | prune 0.5 |" in (tmp_path / "out/tiny.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(study_run, "plot", plot)
        assert main(words) == 0
    results = (tmp_path / "out/tiny.csv").read_text()
    speeds = (tmp_path / "out/tiny-speed.csv").read_text()
    assert len(results.splitlines()) == len(speeds.splitlines()) == 6
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {
        f"tiny-{axis}.{kind}"
        for axis in ("throughput", "flops", "memory")
        for kind in ("png", "svg")
    }
    assert names == {"tiny.csv", "tiny-speed.csv", "tiny.md"} | plots
    assert "![tiny-flops.svg](tiny-flops.svg)" in (tmp_path / "out/tiny.md").read_text()
    assert main(words) == 0
    assert "5 of them done" in capsys.readouterr().out
    assert (tmp_path / "out/tiny.csv").read_text() == results
    (tmp_path / "out/tiny.md").unlink()
    assert main([*words, "--only", "plots"]) == 0
    assert "| PuMer | prune 0.5 |" in (tmp_path / "out/tiny.md").read_text()


@pytest.mark.parametrize("finished", [True, False], ids=["finishes", "dies"])
def test_a_point_that_another_process_is_at_is_left_to_it(study, tmp_path, monkeypatch, finished):
    one = study(
        methods=[{"name": "PuMer", "reducer": PUMER, "points": [{"prune": 0.1}, {"prune": 0.5}]}]
    )
    run(one, tmp_path / "alone", scratch=tmp_path / "runs", log=lambda text: None)
    alone = (tmp_path / "alone/tiny.csv").read_text().splitlines(keepends=True)
    results = tmp_path / "out/tiny.csv"
    results.parent.mkdir()
    results.write_text(alone[0])
    said, seen = [], []
    with ExitStack() as other:
        first, *_ = one.candidates()[0]
        assert other.enter_context(claimed(tmp_path / "runs/study-tiny" / first.id)) is not None

        def end(seconds):
            seen.append([row["id"] for row in read_rows(results, "tiny")])
            if finished:
                results.write_text(results.read_text() + alone[1])
            other.close()

        monkeypatch.setattr(study_run.time, "sleep", end)
        run(one, results.parent, scratch=tmp_path / "runs", log=said.append)
    assert any("other processes are at the last 1 points" in text for text in said)
    (before,) = seen
    ids = [row["id"] for row in read_rows(results, "tiny")]
    assert ids == [*before, first.id]
    assert set(ids) == {line.partition(",")[0] for line in alone[1:]}
    if finished:
        assert results.read_text().endswith(alone[1])


def test_impossible_settings_are_named_before_anything_runs(study, tmp_path, capsys):
    methods = [
        {
            "name": "PuMer",
            "reducer": PUMER,
            "points": [{"prune": 0.1}, {"prune": 0.8}, {"layers": [7]}, {"x": 1}],
        }
    ]
    study(methods=methods)
    words = [
        "study",
        str(tmp_path / "tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--scratch",
        str(tmp_path / "runs"),
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "3 impossible settings" in said
    assert all(
        text in said
        for text in ("prune 0.8: prune 0.8 + merge", "layers 7: pumer reduces in", "no setting x")
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--skip_impossible", "true"]) == 0
    assert len(read_rows(tmp_path / "out/tiny.csv", "tiny")) == 2


@pytest.mark.slow
def test_a_training_that_fails_says_why(study, tmp_path):
    bad = TRAIN | {"trainer": TRAINER | {"lr_scheduler_type": "nothing"}}
    with pytest.raises(ValueError, match=r"a training failed[\s\S]*nothing"):
        run(
            study(train=bad, processes=1),
            tmp_path / "out",
            scratch=tmp_path / "runs",
            log=lambda text: None,
        )


def results(folder):
    """Rows without what depends on the clock."""
    with (folder / "tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if "seconds" not in name and name != "date"}
        for row in rows
    ]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_it_ends_as_if_it_were_not(study, tmp_path, monkeypatch):
    one = study(train=TRAIN, processes=1)

    file, out, scratch = tmp_path / "tiny.yaml", tmp_path / "out", tmp_path / "runs"
    command = [
        sys.executable,
        "-m",
        "pumer.cli",
        "study",
        str(file),
        "--out",
        str(out),
        "--scratch",
        str(scratch),
    ]
    # Its first training goes on for longer than it is allowed to live.
    env = os.environ | {"PYTHONPATH": str(Path(pumer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while (
        not list(scratch.glob("study-tiny/*/training/checkpoint-2/trainer_state.json"))
        and time.monotonic() < end
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "tiny.csv").exists()
    # What a kill in the middle of writing a checkpoint leaves.
    (folder,) = scratch.glob("study-tiny/*/training")
    with locked(folder.parent):  # until its training has ended, too
        pass
    (folder / "checkpoint-9").mkdir()

    resumed, caches = [], []

    def noting(words, processes, log, lock):
        resumed.append(words[-1])
        caches.append(Path(yaml.safe_load(Path(words[2]).read_text())["distill"]["cache"]))
        in_this_process(words, processes, log, lock)

    monkeypatch.setattr(train_launch, "launch", noting)
    run(one, out, scratch=scratch, log=lambda text: None)
    assert resumed == ["true", "false"]
    assert not list(scratch.glob("study-tiny/*/training"))
    assert caches[0] == caches[1]  # the teacher was asked once for both
    assert not caches[0].exists()

    monkeypatch.setattr(train_launch, "launch", in_this_process)
    run(one, tmp_path / "unbroken", scratch=tmp_path / "others", log=lambda text: None)
    assert results(out) == results(tmp_path / "unbroken")
    untrained, _ = study().candidates()
    run(study(), tmp_path / "start", scratch=tmp_path / "runs", log=lambda text: None)
    assert {row["id"] for row in results(tmp_path / "start")} == {point.id for point in untrained}
    assert (
        results(out)[0]["details"] != results(tmp_path / "start")[0]["details"]
    )  # it is the trained model's score


def test_of_a_point_that_was_measured_again_the_later_row_counts(tmp_path):
    file = tmp_path / "tiny.csv"
    blank = dict.fromkeys(COLUMNS, "") | {"study": "tiny", "method": "ToMe"}
    rows = [
        blank | {"id": "a", "label": "r 1", "date": "2026-11-21", "accuracy": "50"},
        blank | {"id": "b", "label": "r 2", "date": "2026-11-21", "accuracy": "60"},
        blank | {"id": "a", "label": "r 1", "date": "2026-11-27", "accuracy": "70"},
    ]

    def write(rows):
        file.write_text(
            "".join(
                ",".join(map(str, row)) + "\n" for row in (COLUMNS, *(r.values() for r in rows))
            )
        )

    write(rows)
    assert [(row["id"], row["accuracy"]) for row in read_rows(file, "tiny")] == [
        ("a", 70.0),
        ("b", 60.0),
    ]
    for again in ("2026-11-21", "2026-11-20"):
        write([*rows[:2], rows[2] | {"date": again}])
        with pytest.raises(ValueError, match="line 4, repeats"):
            read_rows(file, "tiny")
    write([*rows[:2], rows[2] | {"id": "c"}])  # the method has other defaults since
    assert [(row["id"], row["accuracy"]) for row in read_rows(file, "tiny")] == [
        ("b", 60.0),
        ("c", 70.0),
    ]
