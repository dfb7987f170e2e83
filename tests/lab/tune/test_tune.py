"""Tuning: error rates of the sequential test, the grid, independent examples, the search, the
command."""

import csv
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import tiny_llm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model as tiny_model

import pumer
from pumer._files import claimed
from pumer.cli import main
from pumer.hub import save
from pumer.lab.bench.latency import LatencyModel
from pumer.lab.commands import tune as tune_command
from pumer.lab.commands.tune import read_size
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks.base import Collator
from pumer.lab.train import launch as train_launch
from pumer.lab.tune import examples as tune_examples
from pumer.lab.tune import finetune as tune_finetune
from pumer.lab.tune import run as tune_run
from pumer.lab.tune.evidence import nearest_point
from pumer.lab.tune.examples import ExamplePool
from pumer.lab.tune.plot import plot
from pumer.lab.tune.points import Bounds, Planned, check_reachable, plan
from pumer.lab.tune.search import LOOK, Search
from pumer.lab.tune.sequential import STAKES, PairedDrop
from pumer.lab.tune.space import GridPoint, SearchGrid, dominates, schedules, space
from pumer.presets import read_reducer

optuna.logging.set_verbosity(optuna.logging.WARNING)
SMALL = SearchGrid(
    prune=[0.0, 0.2],
    merge=[0.0, 0.2, 0.4],
    merge_text=[0.0, 0.2],
    layers=[[0], [1], [1, 2], [2]],
    tome=[0],
)


# --- the test ---


def slow_wealth(differences, bound, sign, stakes):
    """Wealth of the bettor, one example after the other."""
    wealth = [1.0] * len(stakes)
    for difference in differences:
        wealth = [
            have * (1 + stake * sign * (bound - difference))
            for have, stake in zip(wealth, stakes, strict=True)
        ]
    return sum(wealth) / len(wealth)


@given(
    st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.0, 0.0, 0.6, 1.0]), min_size=1, max_size=60),
    st.randoms(),
)
@settings(max_examples=20)
def test_interval_is_where_the_bettor_has_not_won(differences, random):
    test, shuffled = PairedDrop(0.1), PairedDrop(0.1)
    test.update(differences)
    shuffled.update(random.sample(differences, len(differences)))
    assert (test.lower, test.upper) == pytest.approx((shuffled.lower, shuffled.upper), abs=1e-9)
    assert -1 <= test.lower <= test.mean <= test.upper <= 1
    for end, sign in ((test.upper, 1), (test.lower, -1)):
        if abs(end) < 1:
            assert slow_wealth(differences, end + sign * 1e-6, sign, STAKES) >= 1 / 0.1
            assert slow_wealth(differences, end - sign * 1e-6, sign, STAKES) < 1 / 0.1


def differences(generator, drop, discordance, number):
    """Paired differences of right and wrong answers: `discordance` of them are not 0."""
    shares = [(discordance + drop) / 2, 1 - discordance, (discordance - drop) / 2]
    return generator.choice([1.0, 0.0, -1.0], p=shares, size=number)


def outcomes(drop, runs, bound=0.02, tuned=False, looks=20, each=150):
    """How often the drop is said to be within the bound, and over it, looking after every `each`
    examples."""
    within = over = 0
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        test = PairedDrop(0.1)
        if tuned:
            before = PairedDrop()
            before.update(differences(generator, drop, 0.06, 500))
            test = PairedDrop(0.1, before.stakes_for(looks * each, 0.1))
        for _ in range(looks):
            test.update(differences(generator, drop, 0.06, each))
            if test.upper <= bound or test.lower > bound:
                break
        within += test.upper <= bound
        over += test.lower > bound
    return within / runs, over / runs


@pytest.mark.parametrize("tuned", [False, True])
def test_error_rates_hold_under_continuous_looks(tuned):
    # At the bound itself either answer is wrong; three standard errors of 60 runs are allowed.
    within, over = outcomes(0.02, 60, tuned=tuned)
    slack = 3 * math.sqrt(0.1 * 0.9 / 60)
    assert within <= 0.1 + slack
    assert over <= 0.1 + slack


def test_fixed_looks_would_break():
    """An ordinary interval at every look says "within" far too often: what the betting is for."""
    wrong = 0
    for seed in range(100):
        drawn = differences(np.random.default_rng(seed), 0.02, 0.06, 3000)
        seen = np.arange(100, 3001, 100)
        means = drawn.cumsum()[seen - 1] / seen
        wrong += (means + 1.2816 * drawn.std() / np.sqrt(seen) <= 0.02).any()
    assert wrong / 100 > 0.2


def test_power():
    within, _ = outcomes(0.0, 20, tuned=True)
    assert within >= 0.9
    _, over = outcomes(0.06, 20)
    assert over >= 0.9


def test_reachable_foresees_the_end():
    generator, foreseen, happened = np.random.default_rng(0), [], []
    for drop in (0.0, 0.05):
        test = PairedDrop()
        test.update(differences(generator, drop, 0.06, 1000))
        foreseen.append(test.reachable(0.02, 4000, 0.0, 0.05))
        fresh = PairedDrop(0.05, test.stakes_for(4000, 0.05))
        fresh.update(differences(generator, drop, 0.06, 4000))
        happened.append(fresh.upper <= 0.02)
    assert foreseen == happened == [True, False]
    assert not test.reachable(0.02, 4000, 2.0, 0.05)


def test_what_no_score_can_be_is_refused():
    with pytest.raises(ValueError, match="cannot differ by"):
        PairedDrop().update([1.5])
    with pytest.raises(ValueError, match="alpha"):
        PairedDrop(0.0)


# --- the grid ---


def slow_milder(one, other):
    if one == other:
        return False
    ratios = all(
        getattr(one, n) <= getattr(other, n)
        for n in ("prune", "merge", "merge_text", "tower", "tome")
    )
    return ratios and all(
        len([x for x in one.layers if x <= depth]) <= len([x for x in other.layers if x <= depth])
        for depth in range(12)
    )


def test_milder_is_less_everywhere():
    points = space(replace(SMALL, tome=[0, 2, 4]), tiny_model()).points
    assert [point.name for point in points if point.tome] == ["ToMe 2", "ToMe 4"]
    table = dominates(points)
    assert all(
        table[i, j] == slow_milder(a, b) for i, a in enumerate(points) for j, b in enumerate(points)
    )
    assert table.any()


def test_schedules_fit_and_are_distinct():
    for depth in (2, 4, 6, 12, 24):
        found = schedules(depth)
        assert found
        assert len(set(found)) == len(found)
        assert all(0 <= layer < depth for layers in found for layer in layers)
    assert (2, 5, 8) not in schedules(6)
    assert (1, 2, 3) in schedules(6)


def test_default_grids_fit_every_family():
    assert not space(SearchGrid(prune=[0.1]), tiny_model()).impossible
    towers = space(
        SearchGrid(prune=[0.1], merge=[0.2], merge_text=[0.0]),
        tiny_model("MeterForQuestionAnswering"),
    )
    assert {point.reducer.name for point in towers.points} == {"pumer", "tome", "compose"}
    assert len({repr(point.reducer) for point in towers.points}) == len(towers.points)
    net = tiny_llm.model("llava")
    found = [
        point
        for point in space(SearchGrid(prune=[0.0], merge=[0.0], merge_text=[0.0]), net, True).points
        if point.tome and not point.tower
    ]
    assert len(found) >= 4
    for point in found:  # in a decoder
        with pumer.reduced(net, point.reducer):
            assert not point.reducer.proportional


def test_impossible_settings_are_named_and_skipped_on_request():
    net = tiny_model()
    grid = SearchGrid(
        prune=[0.1, 0.7], merge=[0.2, 0.5], merge_text=[0.0], layers=[[1], [7]], tome=[0]
    )
    with pytest.raises(
        ValueError, match=r"5 settings of the grid are impossible \(prune 0.1 merge 0.2 .* layers 7"
    ):
        space(grid, net)
    kept = space(grid, net, skip_impossible=True)
    assert (len(kept.points), len(kept.impossible)) == (3, 5)
    with pytest.raises(ValueError, match="no setting"):
        space(SearchGrid([0.0], [0.0], [0.0], tome=[0]), net)
    with pytest.raises(ValueError, match="no values for merge"):
        space(SearchGrid(merge=[]), net)
    with pytest.raises(ValueError, match="no vision tower"):
        space(SearchGrid(prune=[0.1], tower=[2]), net)
    assert pumer.active(net) is None


# --- examples ---


@pytest.fixture(scope="module")
def task():
    return Scenes(questions=360, per_picture=2, image_size=96)


@pytest.fixture(scope="module")
def tokenizer(task):
    return train_tokenizer([example.text for example in task.examples("train")[:40]], 300)


@pytest.fixture(scope="module")
def model(task):
    labels = dict(enumerate(task.labels))
    return tiny_model(
        num_labels=len(labels), id2label=labels, vocab_size=300, max_position_embeddings=24
    )


@pytest.fixture
def timed_once(model, monkeypatch):
    """`calibrate` times real forwards once for all tests that tune: of the same model, at the first
    batch size."""

    def calibrate(net, inputs):
        if not _TIMED:
            _TIMED.append(calibrate_once(net, inputs))
        return _TIMED[0]

    monkeypatch.setattr(tune_run, "calibrate", calibrate)


_TIMED, calibrate_once = [], tune_run.calibrate


@pytest.fixture
def collator(task, tokenizer):
    return Collator(task, TextTransform(tokenizer, 24), Square(96))


def test_examples_are_independent_and_the_same_again(model, collator, task, monkeypatch):
    pools = [ExamplePool(task.examples("val"), collator, 16, 56, seed=3)]
    monkeypatch.setattr(tune_examples, "_KEEP", 0)
    pools.append(ExamplePool(task.examples("val"), collator, 16, 56, seed=3))
    first, remade = (list(pool.scores(model, range(10))) for pool in pools)
    assert first == remade
    assert [len(scores) for scores in first] == [16, 16, 16, 8]
    clusters = [example.cluster for batch in pools[0]._batches for example in batch.examples]
    assert len(set(clusters)) == len(clusters) == 56
    assert ExamplePool(task.examples("val"), collator, 32, 500).size(99) == 180  # pictures
    assert ExamplePool(task.examples("val"), collator, 32, 500).available == 180
    assert ExamplePool(task.examples("val"), collator, 32, 50).available == 50


def test_few_pictures_with_many_questions_are_shared_out(
    model, collator, task, tmp_path, monkeypatch, timed_once
):
    """There is something to check on, however many questions there are of each picture."""
    monkeypatch.setattr(tune_run, "plot", lambda *_: None)
    many = Scenes(questions=400, per_picture=10, image_size=96).examples("val")
    found = tune_run.tune(
        model,
        many,
        collator,
        Bounds(memory=10**12),
        tmp_path / "out",
        grid=SMALL,
        batch_size=4,
        choose=100,
        check=100,
    )
    assert found.judged.examples == found.checked.examples == 20
    with pytest.raises(ValueError, match="at most one per image, are too few"):
        tune_run.tune(
            model,
            many,
            collator,
            Bounds(memory=10**12),
            tmp_path / "other",
            grid=SMALL,
            batch_size=8,
        )


# --- the search ---


class MadeUp:
    """Scores as the examples of a pool might get them, by a true drop for every reducer: no model
    is asked."""

    batch_size = 32

    def __init__(self, drop, seed=0, fuse=10**9):
        self.drop, self.seed, self.fuse, self.asked = drop, seed, fuse, []

    def size(self, count):
        return 32 * count

    def scores(self, model, batches):
        reducer = pumer.active(model).reducer
        for number in batches:
            self.fuse -= 1
            if self.fuse < 0:
                raise KeyboardInterrupt
            self.asked.append((repr(reducer), number))
            right = np.random.default_rng([self.seed, number]).random(32) < 0.9
            if not isinstance(reducer, pumer.Unreduced):
                saved = json.dumps(pumer.reducers.to_dict(reducer))  # new settings do not change it
                own = np.random.default_rng([self.seed, number, zlib.crc32(saved.encode())])
                chance = np.where(right, 1 - (self.drop(reducer) + 0.01) / 0.9, 0.1)
                right = own.random(32) < chance
            yield right.astype(float).tolist()


def true_drop(reducer):
    weight = sum(0.5**layer for layer in reducer.layers)
    return weight * (0.3 * reducer.prune + 0.4 * reducer.merge**2 + 0.1 * reducer.merge_text)


@pytest.fixture(scope="module")
def known():
    return known_times(SMALL)


def known_times(grid):
    """A grid of a tiny model, planned with times that are as its FLOPs."""
    net = tiny_model()
    found = space(grid, net)
    base = pumer.report(net, 10)
    others = ("forward", "tokens", "pairs", "reducer", "reducer operators", "reducer traffic")
    terms = dict.fromkeys(others, 0.0)
    inputs = {"input_ids": torch.zeros(8, 10)}
    return (
        net,
        found,
        plan(
            net, found.points, LatencyModel(terms | {"products": 1e-9}), base, inputs, memory=False
        ),
    )


def search(known, bounds, pool, study=None, **changes):
    net, grid, planned = known
    study = study or optuna.create_study(direction="maximize")
    return Search(net, grid, planned, bounds, pool, 40, 100, study, **changes)


def settle(one):
    while (best := one.run()) is not None:
        if one.verify(best).status == "accepted":
            return best
    return None


def test_points_are_planned_fastest_first(known):
    _, grid, planned = known
    assert len(planned) == len(grid.points)
    assert [one.speedup for one in planned] == sorted(
        (one.speedup for one in planned), reverse=True
    )
    with pumer.reduced(known[0], planned[0].point.reducer):
        assert planned[0].flops_ratio == pumer.report(known[0], 10).ratio


def test_the_first_points_halve_the_grid_method_by_method():
    grid = replace(SMALL, tome=[0, 1, 2, 3])
    one = search(
        known_times(grid), Bounds(drop=3.0), MadeUp(lambda reducer: 0.03 * len(reducer.layers))
    )
    for number, tome in enumerate([False, True, False]):
        speeds = sorted(
            other.speedup for other in one.open_points() if (other.point.tome > 0) == tome
        )
        one.trials = number + 1
        one.run()
        judged = next(
            other for other in one.planned if other.point.name == list(one.judged)[number]
        )
        assert (judged.point.tome > 0) == tome
        assert judged.speedup == speeds[len(speeds) // 2]


def test_found_points_hold(known):
    drops = []
    for seed in range(6):
        one = search(known, Bounds(drop=3.0), MadeUp(true_drop, seed), seed=seed)
        best = settle(one)
        drops.append(100 * true_drop(best.point.reducer))
        assert one.checked[best.point.name].high <= 3.0
        assert len(one.judged) < len(one.planned) / 2
        # Every other point has a reason not to have been judged.
        assert len(one.judged) + len(one.excluded()) == len(one.planned)
    assert sum(drop <= 3.0 for drop in drops) >= 5
    assert max(drops) > 0.5  # and are not the mildest there are


def test_least_drop_among_fast_enough(known):
    one = search(known, Bounds(speedup=1.3), MadeUp(true_drop))
    best = settle(one)
    fits = [other for other in one.planned if other.speedup >= 1.3]
    assert best in fits
    least = min(true_drop(other.point.reducer) for other in fits)
    assert true_drop(best.point.reducer) <= least + 0.01
    assert all(one.excluded()[o.point.name] == "too slow" for o in one.planned if o.speedup < 1.3)
    # A point that proves slower than predicted teaches the search to ask for more.
    one.correct(best, 0.9 * best.speedup, None)
    assert settle(one).speedup >= 1.3 / 0.9


def test_a_stopped_search_goes_on_where_it_was(known, tmp_path):
    def study():
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "log"))
        storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", load_if_exists=True
        )

    whole = MadeUp(true_drop)
    uninterrupted = search(known, Bounds(drop=3.0), whole)
    best = settle(uninterrupted)
    pools, fuses = [], (0, 30, 31, 75, 10**9)
    for fuse in fuses:
        pools.append(MadeUp(true_drop, fuse=fuse))
        resumed = search(known, Bounds(drop=3.0), pools[-1], study())
        try:
            found = settle(resumed)
        except KeyboardInterrupt:
            found = None
    assert found == best
    assert resumed.judged == uninterrupted.judged
    assert resumed.checked == uninterrupted.checked
    # Only what was under way when it was stopped is done twice, at most one point each time.
    again = len([x for pool in pools for x in pool.asked]) - len(whole.asked)
    assert again <= (len(fuses) - 1) * 40
    unreduced = [
        number for pool in pools for reducer, number in pool.asked if "Unreduced" in reducer
    ]
    assert len(set(unreduced)) == len(unreduced)
    before = MadeUp(true_drop)
    assert settle(search(known, Bounds(drop=3.0), before, study())) == best
    assert before.asked == []


def test_a_point_that_measured_breaks_a_bound_is_not_chosen_again(known, monkeypatch):
    """Neither where the lesson from one lets the other in, and the other way round."""
    memory = {one.point.name: 100.0 + number for number, one in enumerate(known[2])}
    net, grid, planned = known
    planned = [replace(one, memory=memory[one.point.name]) for one in planned]
    one = search((net, grid, planned), Bounds(speedup=1.05, memory=10**6), MadeUp(true_drop))
    measured = []

    def measure(model, inputs, reducers, runs):
        measured.append(next(iter(reducers)))
        return {"fused": 1.0, measured[-1]: 1.0 if len(measured) % 2 else 0.5}, None

    monkeypatch.setattr(tune_run, "FUSED", "fused")
    monkeypatch.setattr(tune_run, "measure", measure)
    monkeypatch.setattr(tune_run, "weight_bytes", lambda model: 10**7)
    monkeypatch.setattr(tune_run, "peak_memory", lambda model, inputs: 0)
    assert tune_run._settle(one, {}, lambda line: None) == (None, 0.0, 0)
    assert len(measured) == len(set(measured)) > 0
    assert {one.status(found) for found in planned if found.point.name in measured} == {"unfit"}
    assert f"the nearest is {measured[0]}, 1.00 times as fast, 10 MB" in nearest_point(one)


def test_a_point_that_was_never_begun_is_not_taken_for_the_next(known):
    """Killed right between naming a point to Optuna and asking for it."""
    _, grid, planned = known
    study = optuna.create_study(direction="maximize")
    search(known, Bounds(drop=3.0), MadeUp(true_drop), study, trials=2).run()
    study.enqueue_trial(grid.indices(planned[0].point))
    search(known, Bounds(drop=3.0), MadeUp(true_drop), study).run()
    states = [trial.state for trial in study.trials]
    assert optuna.trial.TrialState.WAITING not in states
    points = {one.point.name: grid.indices(one.point) for one in planned}
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert trial.params == points[trial.user_attrs["point"]]


def test_a_check_looks_at_no_more_of_the_unreduced_model_than_it_compares(known):
    one = search(known, Bounds(drop=3.0), MadeUp(true_drop), trials=40)
    best = one.run()
    before = set(one._base)
    one.verify(best)
    assert all(number in one.check for number in set(one._base) - before)


def test_a_journal_that_was_cut_off_goes_on(tmp_path):
    study = tune_run._open(tmp_path / "study.log", {"seed": 1})
    study.set_user_attr("known", 3)
    with (tmp_path / "study.log").open("a") as file:
        file.write('{"op_code": 2, "wor')  # a kill in the middle of a line
    again = tune_run._open(tmp_path / "study.log", {"seed": 1})
    again.set_user_attr("more", 4)
    assert tune_run._open(tmp_path / "study.log", {"seed": 1}).user_attrs.keys() >= {
        "known",
        "more",
    }


def test_the_lock_of_a_journal_can_be_looked_at(tmp_path, monkeypatch):
    """Optuna's lock is a symbolic link to the path that it was given, which has to lead
    somewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    study = tune_run._open(Path("out/study.log"), {"seed": 1})
    assert Path(study._storage._backend._file_path).is_absolute()


def test_looks_come_often_enough_to_stop_early(known):
    pool = MadeUp(lambda reducer: 0.5)
    one = search(known, Bounds(drop=1.0), pool, trials=1)
    assert settle(one) is None
    (found,) = one.judged.values()
    assert found.status in ("over", "hopeless")
    assert found.examples == 32 * LOOK


# --- bounds ---


def test_bounds_that_make_no_sense(known):
    for wrong, message in (
        ({}, "give a bound"),
        ({"drop": 0.0}, "max_drop"),
        ({"speedup": 0.5}, "min_speedup"),
    ):
        with pytest.raises(ValueError, match=message):
            Bounds(**wrong)
    fastest = known[2][0]
    with pytest.raises(
        ValueError, match=f"fastest, {fastest.point.name}, is predicted to be {fastest.speedup:.2f}"
    ):
        check_reachable(known[2], Bounds(speedup=50.0))
    small = Planned(GridPoint(0.1, 0.0, 0.0, (1,)), 1.1, 1.1, memory=7_000_000)
    with pytest.raises(ValueError, match="takes 7 MB"):
        check_reachable([small], Bounds(memory=5_000_000))
    quick = Planned(GridPoint(0.2, 0.0, 0.0, (1,)), 1.5, 1.5, memory=9_000_000)
    with pytest.raises(ValueError, match=r"the smallest that is fast enough, prune 0.2 .*, 9 MB"):
        check_reachable([small, quick], Bounds(speedup=1.4, memory=8_000_000))


def test_sizes():
    assert read_size("300MB") == 300_000_000
    assert read_size("1.5 GiB") == 3 * 2**29
    assert read_size("1000") == 1000
    for wrong in ("big", "-3MB", "0", "3 MBit"):
        with pytest.raises(ValueError, match="300MB"):
            read_size(wrong)


# --- the command ---


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    save(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_transform(Square(96), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def command(folder, tmp_path, monkeypatch, timed_once):
    monkeypatch.setattr(tune_run, "_RUNS", 1)
    task = json.dumps({"name": "scenes", "questions": 300})
    grid = ["--grid.prune", "[0.0, 0.2]", "--grid.merge", "[0.0]", "--grid.merge_text", "[0.0]"]
    grid += ["--grid.layers", "[[1], [2], [1, 2]]", "--grid.tome", "[0]"]
    sizes = ["--choose", "100", "--check", "200", "--batch_size", "10"]
    return [
        "tune",
        "--model",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--task",
        task,
        *grid,
        *sizes,
    ]


@pytest.mark.smoke
def test_tune_writes_preset_evidence_and_plot(command, tmp_path, model, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main([*command, "--max_drop", "90"]) == 0
    assert "times as fast, measured" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "candidates.csv").open()))
    assert [row["status"] for row in rows].count("found") == 1
    assert len(rows) == 3
    reducer = read_reducer(str(out / "reducer.yaml"))
    assert json.loads(rows[0]["reducer"])["layers"] == list(reducer.layers)
    with pumer.reduced(model, str(out / "reducer.yaml")):
        assert pumer.active(model).reducer == reducer
    assert {path.suffix for path in out.glob("tune.*")} == {".png", ".svg"}

    assert main([*command, "--max_drop", "90"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, "--max_drop", "80", "--resume", "true"]) == 2
    assert "of another bounds" in capsys.readouterr().err
    with claimed(out):
        assert main([*command, "--max_drop", "90", "--resume", "true"]) == 2
    assert "another process works in" in capsys.readouterr().err
    monkeypatch.setattr(ExamplePool, "scores", None)  # nothing is predicted again
    monkeypatch.setattr(tune_run, "calibrate", None)
    assert main([*command, "--max_drop", "90", "--resume", "true"]) == 0
    assert list(csv.DictReader((out / "candidates.csv").open())) == rows
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    monkeypatch.setattr(tune_command, "open_model", lambda *given: model)
    assert main([*command, "--max_drop", "90", "--resume", "true"]) == 2
    assert "of another weights" in capsys.readouterr().err


def test_tune_says_what_comes_nearest(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune_run, "plot", lambda *_: None)
    assert main([*command, "--max_drop", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "--max_drop" in said
    assert "the nearest is prune 0.2" in said
    assert not (tmp_path / "out" / "reducer.yaml").exists()
    assert (tmp_path / "out" / "candidates.csv").exists()


def test_tune_leaves_nothing_of_bad_input(command, tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(tune_command, "open_model", lambda *given: model)
    for wrong, message in (
        ([], "give a bound"),
        (["--min_speedup", "50"], "the fastest"),
        (["--max_memory", "1KB"], "the smallest"),
        (["--max_drop", "1", "--grid.layers", "[[9]]"], "impossible"),
        (["--max_drop", "1", "--grid.layers", "[[]]"], "a list of layers in the grid is empty"),
        (["--max_drop", "1", "--choose", "10", "--check", "10"], "too few"),
        (["--max_drop", "1", "--choose", "0"], "--choose: give a whole number from 1"),
        (["--max_drop", "1", "--batch_size", "0"], "--batch_size: give a whole number from 1"),
        (["--max_drop", "1", "--alpha", "0"], "--alpha: give a probability"),
        (["--max_drop", "1", "--alpha", "1.5"], "--alpha: give a probability"),
        (["--max_drop", "1", "--finetune", "nowhere.yaml"], "there is no file nowhere.yaml"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    assert main([*command, "--max_drop", "1"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_finetune_trains_at_the_point_once(tmp_path, monkeypatch):
    launched = []

    def launch(words, processes, log, lock):
        launched.append((words, processes))
        training = tmp_path / "run" / "training"
        training.mkdir(parents=True, exist_ok=True)
        settings = json.loads(words[words.index("--reducer") + 1])
        (training / "recipe.yaml").write_text(json.dumps({"reducer": settings}))
        if len(launched) > 1:  # the first one is killed while it writes what comes last
            (training / "log.json").write_text("[]")

    monkeypatch.setattr(train_launch, "launch", launch)
    base, reducer, recipe = tmp_path / "base", pumer.PuMer(layers=(1,)), tmp_path / "mine.yaml"
    base.mkdir()
    (base / "config.json").write_text("{}")
    recipe.write_text("task: {name: scenes}")

    def finetune(reducer=reducer, recipe="scenes-pumer", processes=2):
        return tune_finetune.finetune(recipe, base, reducer, tmp_path / "run", processes)

    for _ in range(3):
        done = finetune()
    assert done == tmp_path / "run" / "training" / "model"
    assert len(launched) == 2
    words, processes = launched[-1]
    assert processes == 2
    assert (
        words[words.index("--distill.teacher") + 1]
        == words[words.index("--model.path") + 1]
        == str(base)
    )
    for name, change in (
        ("reducer", {"reducer": pumer.PuMer(layers=(2,))}),
        ("recipe", {"recipe": str(recipe)}),
        ("processes", {"processes": 1}),
    ):
        with pytest.raises(ValueError, match=f"a training with another {name}"):
            finetune(**change)
    (base / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match="a training with another model"):
        finetune()
    (tmp_path / "run" / "wanted.json").unlink()
    with pytest.raises(ValueError, match="nothing tells what the training in"):
        finetune()
    assert len(launched) == 2


def test_preset_files(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"reducer": "pumer", "layers": [1]}')
    assert read_reducer(str(file)) == pumer.PuMer(layers=(1,))
    for text, message in (
        ("[1]", "holds no"),
        ("reducer: {", "holds no"),
        ("reducer: no", "no reducer"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_reducer(str(file))
    with pytest.raises(ValueError, match="there is no file"):
        read_reducer("missing.yaml")


def test_plot_without_anything_found(tmp_path):
    row = {
        "status": "over",
        "examples": 5,
        "drop": 3.0,
        "low": 1.5,
        "high": 5.0,
        "predicted_x": 1.2,
        "point": "a",
        "check_examples": 0,
    }
    plot([row], 1.0, tmp_path / "tune")
    assert (tmp_path / "tune.png").stat().st_size > 1000
