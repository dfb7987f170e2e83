"""Benchmarks of models that write an answer: shapes, prompts, the answer itself, the rows, the
command."""

import csv

import pytest
import tiny_llm
import torch

import pumer
from pumer import FastV, PuMer, Unreduced
from pumer._rows import append_rows
from pumer.cli import main
from pumer.lab.bench.llm import Answer, bench_llm, forward_costs
from pumer.lab.bench.llm_models import build, configure, default_reducers, inputs
from pumer.lab.bench.overhead import prefill_shares
from pumer.lab.bench.run import twin
from pumer.lab.bench.settings import AnswerBenchSettings
from pumer.presets import read_reducer

TINY = {"model": "llava-tiny-shape", "layers": None, "tower_layers": None}
FAMILIES = {"llava": 16, "llava_next": 16 + 8 * 9, "qwen2_5_vl": 576, "internvl": 5 * 9}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-1.5-7b-shape", 7_063_427_072),
        ("llava-next-7b-shape", 7_063_431_168),
        ("qwen2.5-vl-7b-shape", 8_292_166_656),
        ("internvl3-8b-shape", 7_944_373_760),
    ],
)
def test_shapes_are_those_of_the_published_checkpoints(name, parameters):
    net = build(configure(name), "meta", torch.bfloat16, "sdpa")
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("llava-1.5-7b-shape", 576),
        ("llava-next-7b-shape", 2880 + 48),  # and newlines
        ("qwen2.5-vl-7b-shape", 576 + 2),  # and where it begins and ends
        ("internvl3-8b-shape", 1280 + 2),
        ("llava-tiny-shape", 144),
    ],
)
def test_shapes_are_cut_in_depth_alone(name, image):
    net = build(configure(name, layers=3, tower_layers=2), "meta", torch.float32, "sdpa")
    assert inputs(net, batch=2, text=64)["input_ids"].shape == (2, 64 + image)
    for settings in default_reducers(net.config):
        pumer.apply(net, read_reducer(settings))
    with pytest.raises(ValueError, match="at least 2"):
        configure(name, layers=1)


@pytest.mark.parametrize(("family", "placeholders"), FAMILIES.items())
def test_the_answer_is_that_of_generate(family, placeholders):
    net = tiny_llm.model(family)
    data = inputs(net, batch=2, text=9)
    assert data["input_ids"].eq(tiny_llm.IMAGE).sum(1).tolist() == [placeholders] * 2
    for reducer in (
        None,
        FastV(keep=0.5, layer=2),
        PuMer(prune=0.1, merge=0.3, merge_text=0.0, layers=(0, 1, 2)),
    ):
        reduced = net if reducer is None else twin(net, reducer)
        answer = Answer(reduced, data, 5, "cpu")
        made = reduced.generate(**data, max_new_tokens=5, do_sample=False)[
            :, data["input_ids"].shape[1] :
        ]
        assert answer().tolist() == made.tolist()


@pytest.mark.parametrize(("family", "placeholders"), FAMILIES.items())
def test_the_cache_holds_what_is_planned(family, placeholders):
    net = tiny_llm.model(family)
    data = inputs(net, batch=2, text=9)
    patches = placeholders - (8 if family == "llava_next" else 0)  # newlines stay
    tokens = data["input_ids"].numel() * tiny_llm.LAYERS
    # After layer 1 of 4.
    expected = {
        None: tokens,
        Unreduced(): tokens,
        FastV(keep=8, layer=2): tokens - 2 * (patches - 8) * 2,
    }
    for reducer, kept in expected.items():
        reduced = net if reducer is None else twin(net, reducer)
        answer = Answer(reduced, data, 1, "cpu")
        answer()
        assert answer.cache_bytes == kept * 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 floats
        assert forward_costs(reduced, data)[1] == answer.cache_bytes


def test_costs_are_those_of_the_report():
    net = tiny_llm.model("llava")
    reduced = twin(net, FastV(keep=0.5, layer=2))
    data = inputs(net, batch=2, text=9)
    for one in (net, reduced):
        Answer(one, data, 1, "cpu")()
        told = pumer.report(one, text=9)
        assert forward_costs(one, data) == (told.macs, 2 * told.cache_bytes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "llm.csv"
    reducers = ["none", {"reducer": "visionzip", "keep": 32}, "fastv"]
    result = bench_llm(
        AnswerBenchSettings(**TINY, reducers=reducers, batch=2, new_tokens=3, runs=2)
    )
    append_rows(path, result.records())
    return result, path


def test_the_table_has_every_variant(measured):
    result, path = measured
    names = [row.variant for row in result.rows]
    assert names == ["stock", "none", "visionzip(keep=32)", "fastv"]
    stock, none, *reduced = result.rows
    assert none.flops_ratio == 1
    assert none.cache_share == 1
    for row in reduced:
        assert row.flops_ratio > 1
        assert row.flops_share == pytest.approx(row.x_prefill / row.flops_ratio)
        assert row.cache_bytes == row.planned_bytes < stock.cache_bytes
        assert row.peak_bytes < stock.peak_bytes
        assert 0 < row.selection < 1
        assert 0 < row.tower < 1
    for row in result.rows:
        for whole, first, token in zip(
            row.whole.seconds, row.prefill.seconds, row.decode.seconds, strict=True
        ):
            assert whole == pytest.approx(first + 2 * token)
    assert "visionzip" in str(result)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == names
    assert {
        "cpu",
        "threads",
        "torch",
        "prefill_median_s",
        "decode_p80_s",
        "cache_bytes",
        "layers",
    } <= set(rows[0])
    with pytest.raises(ValueError, match="no variant is named"):
        result.row("nothing")


def test_an_answer_of_one_token_has_no_further_ones():
    row = bench_llm(
        AnswerBenchSettings(**TINY, reducers=["fastv"], new_tokens=1, runs=1),
        memory=False,
        overhead=False,
    ).row("fastv")
    assert (row.decode, row.x_decode, row.peak_bytes, row.selection) == (None,) * 4


def test_the_stopwatch_leaves_nothing_behind():
    net = pumer.apply(tiny_llm.model("llava"), FastV(keep=0.5, layer=2))
    net(**inputs(net, text=9))  # transformers hooks in with the first forward
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()
    ]
    shares = prefill_shares(net, Answer(net, inputs(net, text=9), 1, "cpu").prefill, runs=1)
    assert 0 < shares.selection < 1
    assert hooks == [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()
    ]
    assert pumer.active(net).timer is None


def test_the_stopwatch_sees_what_is_slow(monkeypatch):
    """A method that dawdles is what nearly all of the prefill goes into."""
    import time

    net = pumer.apply(tiny_llm.model("llava"), FastV(keep=0.5, layer=2))
    plan = FastV.plan
    monkeypatch.setattr(FastV, "plan", lambda *args: (time.sleep(0.5), plan(*args))[1])
    shares = prefill_shares(net, Answer(net, inputs(net, text=9), 1, "cpu").prefill, runs=1)
    assert shares.selection > 0.7
    assert shares.tower < 0.2


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match="no shape is named"):
        bench_llm(AnswerBenchSettings("llava-huge"))
    with pytest.raises(ValueError, match="no reducer is named"):
        bench_llm(AnswerBenchSettings(**TINY, reducers=["fastest"]))
    with pytest.raises(ValueError, match="1 token or more"):
        bench_llm(AnswerBenchSettings(**TINY, new_tokens=0))
    with pytest.raises(ValueError, match="give 1 or more, 2 or more each"):
        bench_llm(AnswerBenchSettings(**TINY, text=1))
    with pytest.raises(ValueError, match="has layers 0 to 3"):
        bench_llm(AnswerBenchSettings(**TINY, reducers=[{"reducer": "fastv", "layer": 9}]))
    with pytest.raises(ValueError, match="give sdpa"):
        bench_llm(AnswerBenchSettings(**TINY, attention="flash_attention_2"))


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "not measured" in str(bench_llm(AnswerBenchSettings(device="cuda")))


def test_command(capsys):
    assert (
        main(["bench", "llm", "--model", "llava-tiny-shape", "--new_tokens", "2", "--runs", "1"])
        == 0
    )
    assert "pumer(" in capsys.readouterr().out
