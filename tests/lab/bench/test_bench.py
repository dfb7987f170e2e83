"""Benchmarks: percentiles, memory of known sizes, rows in files, the whole on a tiny model."""

import csv
from pathlib import Path

import pytest
import torch

from pumer._rows import append_rows
from pumer.cli import main
from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.models import build, inputs
from pumer.lab.bench.run import bench
from pumer.lab.bench.settings import BenchSettings
from pumer.lab.bench.sweep import Sweep
from pumer.lab.bench.timing import Timing, alternate

LLAVA = Path(__file__).parents[3] / "benchmarks" / "models" / "scenes-llava"


def test_percentiles():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (timing.median, timing.p20, timing.p80) == (3.0, pytest.approx(1.8), pytest.approx(4.2))


def test_variants_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = alternate(calls, runs=2, warmup=1)
    assert "".join(order) == "abbaab"
    assert all(len(timing.seconds) == 2 for timing in timings.values())
    with pytest.raises(ValueError, match="1 run or more"):
        alternate(calls, runs=0)


def test_memory_is_what_is_held_at_once():
    def call():
        first = torch.ones(1000)  # 4,000 bytes
        second = first * 2  # 8,000 at once
        del first
        return second + 1  # 8,000 again

    assert peak_activations(call) == 8000
    assert peak_activations(call) == 8000
    assert peak_activations(lambda: torch.ones(1000).add_(1)) == 4000
    linear = torch.nn.Linear(10, 4)
    assert weight_bytes(linear) == 4 * 44


def test_rows_are_added_and_never_changed(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    append_rows(path, [{"a": 1, "b": 2}])
    append_rows(path, [{"a": 3, "b": 4}])
    assert path.read_text() == "a,b\n1,2\n3,4\n"
    with pytest.raises(ValueError, match="other columns"):
        append_rows(path, [{"a": 1, "c": 2}])
    with pytest.raises(ValueError, match="same columns"):
        append_rows(path, [{"a": 1, "b": 2}, {"a": 1}])
    assert path.read_text() == "a,b\n1,2\n3,4\n"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.csv"
    reducers = ["tome", {"reducer": "pumer", "layers": [0, 2], "prune": 0.3}]
    result = bench(BenchSettings("vilt-tiny", reducers, batch=4, text=20, runs=2), warmup=1)
    append_rows(path, result.records())
    return result, path


def test_the_table_has_every_variant(measured):
    result, path = measured
    names = [row.variant for row in result.rows]
    assert names[:3] == ["stock", "fused", "tome"]
    for row in result.rows[2:]:
        assert row.flops_ratio > 1
        assert row.flops_share == pytest.approx(row.x_fused / row.flops_ratio)
        assert 0 < row.overhead < 1
        assert row.peak_bytes < result.row("stock").peak_bytes
    assert "of it the reducer" in str(result)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == names
    assert {"cpu", "threads", "torch", "transformers", "median_s"} <= set(rows[0])


def test_bridgetower_is_measured_beside_its_stock_forward():
    measured = bench(BenchSettings("bridgetower-tiny", batch=2, text=20, runs=1), warmup=1)
    names = [row.variant for row in measured.rows]
    assert names == ["stock", "fused", "meter-vqav2"]
    assert not measured.row("stock").note
    fused, reduced = measured.rows[1:]
    assert reduced.macs < fused.macs


def test_packed_rows_cost_what_they_hold():
    reducers = [{"reducer": "energy", "least": 1, "most": 0.9, "tau": 0.9}]
    settings = BenchSettings("vilt-tiny", reducers, batch=4, text=20, runs=1, pack=True)
    result = bench(settings, warmup=1, memory=False)
    names = [row.variant for row in result.rows]
    assert names[:4] == ["stock", "fused", "fused, packed", names[3]]
    assert names[4] == f"{names[3]}, packed"
    fused, packed, energy, packed_energy = result.rows[1:]
    assert packed.macs < fused.macs
    assert packed_energy.macs < energy.macs
    assert packed_energy.overhead > 0
    assert packed.flops_ratio == pytest.approx(fused.macs / packed.macs)


@pytest.fixture(scope="module")
def measured_meter():
    return bench(BenchSettings("meter-tiny", batch=2, text=20, runs=1), warmup=1)


def test_a_model_that_transformers_lacks(measured_meter):
    names = [row.variant for row in measured_meter.rows]
    assert names == ["stock", "fused", "meter-vqav2", "meter-vqav2-tower", "meter-vqav2-even"]
    inside, tower, _ = measured_meter.rows[2:]
    assert tower.flops_ratio > inside.flops_ratio > 1
    for row in (inside, tower):
        assert 0 < row.overhead < 1
    assert tower.peak_bytes < inside.peak_bytes < measured_meter.row("stock").peak_bytes
    assert "stock: our own METER, unreduced: transformers has none" in str(measured_meter)
    assert measured_meter.records()[0]["note"].startswith("our own METER")
    assert not measured_meter.row("fused").note


def test_inputs_are_as_the_processors_give_them():
    for name, padding in (("vilt-tiny", 0), ("meter-tiny", 1)):
        data = inputs(build(name), batch=3, text=20)
        mask = data["attention_mask"].bool()
        assert sorted(mask.sum(1).tolist())[::2] == [8, 16]
        assert (data["input_ids"][~mask] == padding).all()
        assert (data["input_ids"][mask] > padding).all()
        assert ("token_type_ids" in data) == (name == "vilt-tiny")
        assert data["pixel_values"].shape == (3, 3, 96, 96)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "not measured" in str(bench(BenchSettings("vilt-tiny", device="cuda")))


def test_bad_names_are_explained(measured):
    with pytest.raises(ValueError, match="no model to measure"):
        bench(BenchSettings("vilt-huge"))
    with pytest.raises(ValueError, match="no reducer is named"):
        bench(BenchSettings("vilt-tiny", ["fastest"]))
    with pytest.raises(ValueError, match="once"):
        bench(BenchSettings("vilt-tiny", ["tome", "tome"]))
    with pytest.raises(ValueError, match="no variant is named"):
        measured[0].row("nothing")


def test_where_it_pays(measured, measured_meter):
    cells = Sweep((measured[0],)).cells()
    assert cells[0]["batch"] == 4
    assert cells[0]["x_fused"] == measured[0].rows[-1].x_fused
    assert str(Sweep((measured_meter, measured_meter))).count("stock: our own METER") == 1


def test_command(capsys):
    assert (
        main(["bench", "--model", "vilt-tiny", "--batch", "2", "--text", "20", "--runs", "1"]) == 0
    )
    assert "stock" in capsys.readouterr().out
    sizes = ["--batches", "[1]", "--image_sizes", "[64]", "--runs", "1"]
    assert main(["bench", "where", "--model", "vilt-tiny", *sizes]) == 0
    assert "64" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--reducer", "tome"], ["--reducers", '["tome", "pumer"]']])
def test_a_saved_model_is_timed_and_weighed(words, capsys):
    command = [
        "bench",
        "model",
        "--model",
        "scenes-vilt",
        "--batch",
        "2",
        "--runs",
        "2",
        "--device",
        "cpu",
        *words,
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[2:] if line}
    assert {"stock", "fused", "tome"} <= set(rows)
    assert float(rows["tome"][-1]) < float(rows["fused"][-1])  # GFLOPs
    assert "weights" in lines[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "scenes-vilt"], "nothing reduces scenes-vilt: give --reducer"),
        (
            ["--model", "scenes-vilt", "--reducer", "tome", "--batch", "0"],
            "--batch: give a whole number from 1",
        ),
        (
            ["--model", "scenes-vilt", "--reducer", "tome", "--image", "a.jpg"],
            "give --image and --question",
        ),
    ],
)
def test_a_saved_model_that_cannot_be_measured(words, message, capsys):
    assert main(["bench", "model", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not LLAVA.is_dir(), reason="outside of a checkout")
def test_a_saved_decoder_is_timed_and_weighed(capsys):
    words = [
        "--reducer",
        "divprune",
        "--batch",
        "2",
        "--runs",
        "2",
        "--new_tokens",
        "2",
        "--device",
        "cpu",
    ]
    assert main(["bench", "model", "--model", str(LLAVA), *words]) == 0
    rows = {
        line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:] if line
    }
    assert float(rows["divprune"][-1]) < 0.5 * float(rows["stock"][-1])  # MiB of cache
    assert float(rows["divprune"][-3]) < float(rows["fused"][-3])  # GFLOPs
