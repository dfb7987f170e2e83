"""Settings that are left open are fitted to the model, however a reducer is named."""

import dataclasses
import json
import re

import pytest
import tiny
import tiny_llm
import torch
import yaml

import pumer
from pumer import (
    VTW,
    Compose,
    DyMU,
    HiPrune,
    PuMer,
    PyramidDrop,
    SmartTrim,
    SparseVLM,
    ToMe,
    Unreduced,
    V2Drop,
)
from pumer.adapters import find
from pumer.presets import PRESETS, read_reducer
from pumer.reducers import ModelShape, from_dict, get, list_reducers, to_dict
from pumer.reducers.dymu import DyMUCalibrator
from pumer.reducers.ops.budget import spread, stage_layers

SHIPPED = ("scenes-vilt", "scenes-vilt-pumer")
REFUSED = (
    r"reads the .* of a tower|has no \[CLS\]|has no vision tower|decoders cannot train|by size|"
    r"has none, choose another"
)
"""Reasons that no default can mend."""


@pytest.fixture(scope="module")
def models():
    joint = {name: tiny.model(name) for name in tiny.FAMILIES.values()}
    deep = {"six layers": tiny.model(num_hidden_layers=6)}
    return joint | deep | {name: tiny_llm.model(name) for name in ("llava", "qwen2_5_vl")}


@pytest.mark.parametrize("name", [name for name in list_reducers() if name != "chain"])
def test_every_reducer_by_its_name_alone_fits_every_model_it_can_reduce(models, name):
    fitted = []
    for kind, model in models.items():
        try:
            pumer.apply(model, name)
        except ValueError as error:
            if re.search(REFUSED, str(error)) is None:
                raise
            continue
        reducer = pumer.active(model).reducer
        fitted.append(kind)
        assert reducer.name == name
        assert reducer.layers is not None
        # What was resolved is explicit from then on, and saved so.
        assert from_dict(json.loads(json.dumps(to_dict(reducer)))) == reducer
        pumer.remove(model)
    assert fitted, "no model takes the defaults"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "reducer", ["tome", "pumer", "sparsevlm", "pyramiddrop", "dymu", "svd-prune"]
)
def test_shipped_models_are_reduced_by_defaults(name, reducer):
    model = pumer.apply(pumer.load(name), reducer)
    report = pumer.report(model)
    assert report.macs < report.base_macs or reducer == "dymu"  # dymu's data decide


def test_a_decoder_really_gets_shorter_with_defaults():
    for reducer in (
        *("tome", "pumer", "pyramiddrop", "sparsevlm", "fastv"),
        *("v2drop", "vtw"),
    ):
        model = pumer.apply(tiny_llm.model("llava"), reducer)
        with torch.no_grad():
            model(**tiny_llm.batch("llava"))
        lengths = pumer.active(model).lengths
        assert sum(lengths[-1]) < sum(lengths[0]), reducer


@pytest.mark.parametrize(
    ("depth", "last", "expected"),
    [
        (12, 11, (2, 5, 8)),
        (32, 30, (7, 15, 23)),
        (6, 5, (1, 2, 3)),
        (4, 2, (0, 1, 2)),
        (3, 2, (0, 1, 2)),
    ],
)
def test_stages_end_where_the_papers_have_them(depth, last, expected):
    assert stage_layers(3, depth, last) == expected


def test_too_shallow_a_model_is_told():
    with pytest.raises(ValueError, match="3 stages, but only 2 layers"):
        spread((0.2, 0.4, 0.6), 3, 1)


def test_published_defaults():
    llava = ModelShape(
        depth=32, last=30, image=576, proportional=False, encoder=True, tower=ModelShape(24, 23)
    )
    vilt = ModelShape(depth=12, last=11, image=144)
    assert PuMer().resolve(vilt).layers == (2, 5, 8)
    assert ToMe().resolve(vilt) == ToMe(r=8, depth=12, proportional=True)
    assert PyramidDrop().resolve(llava) == PyramidDrop(keep=(0.5, 0.25, 0.125), layers=(7, 15, 23))
    assert V2Drop().resolve(llava).layers == (2, 16, 21)
    assert VTW().resolve(llava) == VTW(layer=16)
    clip, qwen = tuple(range(1, 25)), (8, 16, 24, 32)
    for layers, expected in ((clip, 9), (qwen, 16)):
        encoder = dataclasses.replace(llava, encoder_depth=max(layers), encoder_layers=layers)
        assert HiPrune().resolve(encoder).object_layer == expected
        with pytest.raises(ValueError, match="object_layer is a layer of the vision encoder"):
            HiPrune(object_layer=99).resolve(encoder)
    assert SparseVLM().resolve(llava) == SparseVLM(keep=(300, 200, 110), layers=(2, 6, 15))
    composed = Compose().resolve(llava)
    assert composed.tower == ToMe(r=8, depth=24, proportional=True)
    assert composed.inside.layers == (7, 15, 23)
    assert (
        Compose(ToMe(), SmartTrim()).resolve(dataclasses.replace(llava)).tower.proportional is False
    )
    assert DyMU().resolve(vilt).thresholds == (0.85,) * 12


def test_explicit_settings_are_kept():
    shape = ModelShape(depth=12, last=11, image=144)
    for reducer in (
        ToMe(r=4, depth=6, proportional=False),
        PuMer(layers=(1,)),
        PyramidDrop(0.5, (3, 7)),
    ):
        assert reducer.resolve(shape) == reducer


def test_one_share_is_the_same_in_every_stage():
    assert PyramidDrop(keep=0.5, layers=(1, 2)).keep == (0.5, 0.25)
    assert PyramidDrop(layers=(1, 2, 3)).keep == (0.5, 0.25, 0.125)


def test_nothing_inside_is_unreduced():
    assert Compose(ToMe(), inside=None) == Compose(ToMe(), Unreduced())
    model = pumer.apply(tiny_llm.model("llava"), Compose(ToMe(r=2), inside=None))
    assert pumer.active(model).reducer.traits.vision_reducer.depth == find(model).tower_depth(model)


def test_cutoffs_of_a_shallow_tower_can_be_read():
    cutoffs = DyMUCalibrator(r=2)
    model = pumer.apply(tiny.model("MeterForQuestionAnswering"), Compose(cutoffs, inside=None))
    with torch.no_grad():
        model(**tiny.batch("MeterForQuestionAnswering"))
    assert len(cutoffs.thresholds()) == tiny.TOWER


def test_files_that_were_saved_before_mean_what_they_meant():
    every = from_dict(
        {"reducer": "pumer", "prune": 0, "merge": 5, "layers": None, "official": True}
    )
    assert every.layers == "all"
    assert to_dict(every)["layers"] is None
    assert from_dict(to_dict(every)) == every
    assert from_dict(to_dict(PuMer())) == PuMer()


# --- one way to name a reducer ---


def test_every_way_to_name_a_reducer(tmp_path):
    expected = ToMe(r=3, depth=4)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(to_dict(expected)))
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(expected)))
    model = pumer.apply(tiny.model(), expected)
    pumer.save(model, tmp_path / "model")
    resolved = pumer.active(model).reducer
    by_settings = {"reducer": "tome", "r": 3, "depth": 4}
    for spec in (
        expected,
        by_settings,
        str(tmp_path / "settings.yaml"),
        tmp_path / "settings.json",
    ):
        assert read_reducer(spec) == expected
    for spec in (tmp_path / "model", str(tmp_path / "model"), tmp_path / "model" / "pumer.json"):
        assert read_reducer(spec) == resolved
    assert read_reducer("tome") == read_reducer(ToMe) == read_reducer({"reducer": "tome"}) == ToMe()
    assert read_reducer("vilt-vqav2") is PRESETS["vilt-vqav2"]
    assert read_reducer({"reducer": "vilt-vqav2", "prune": 0.2}).prune == 0.2
    assert read_reducer("scenes-vilt-pumer").layers == (1, 2, 3)
    for spec in (by_settings, "tome", ToMe, expected, tmp_path / "model"):
        with pumer.reduced(model, spec):
            assert pumer.active(model).reducer.name == "tome"


def test_a_model_that_nothing_reduces_names_no_reducer():
    with pytest.raises(ValueError, match="nothing reduces the model in"):
        read_reducer("scenes-vilt")


def test_load_takes_the_names_of_shipped_models():
    assert pumer.active(pumer.load("scenes-vilt-pumer")).reducer.layers == (1, 2, 3)
    with pytest.raises(
        ValueError, match=r"is not a model folder. Did you mean 'scenes-vilt-pumer'\?"
    ):
        pumer.load("scenes-vilt-pummer")


# --- what a user sees ---


def test_every_setting_is_in_the_docstring():
    lacking = {
        f"{name}.{field.name}"
        for name in list_reducers()
        for field in dataclasses.fields(get(name))
        if not re.search(rf"^ {{8}}.*\b{field.name}\b.*: ", get(name).__doc__, re.M)
    }
    assert not lacking


def test_a_patch_is_printed_in_a_line():
    text = repr(pumer.active(pumer.apply(tiny.model(), "tome")))
    assert text == (
        "Patch(ToMe(r=8, depth=4, proportional=True), family='ViLT', attention='sdpa', trim=True)"
    )
