"""Bad input is answered with what to do about it, and changes nothing."""

from pathlib import Path

import matrix
import pytest
import tiny
import torch
from torch import nn
from transformers import BertConfig, BertModel

import pumer
from pumer import Chain, FastV, NoVision, Pool, PuMer, PyramidDrop, Random, ToMe, Uniform
from pumer.adapters.base import adapters
from pumer.adapters.families import EXAMPLES
from pumer.reducers import from_dict, get, list_reducers, register, to_dict

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def bert():
    return BertModel(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=9,
        )
    )


@pytest.mark.parametrize(
    "unsupported", [bert, lambda: nn.Linear(2, 2), lambda: None, lambda: "dandelin/vilt-b32-mlm"]
)
def test_other_models_are_refused_with_the_families_and_where_to_read_on(unsupported):
    with pytest.raises(ValueError, match=r"cannot be reduced") as error:
        pumer.apply(unsupported(), PuMer())
    lines = str(error.value).splitlines()
    assert len(lines) <= 5
    assert max(map(len, lines)) < 160
    families = [adapter.family for adapter in adapters()]
    assert f"Supported are {len(families)} families" in lines[-2]
    assert set(EXAMPLES) <= set(families)
    for name in ("models.md", "add-a-model.md"):
        assert (DOCS / name).is_file()
        assert f"docs/{name}" in lines[-1]


def test_the_nearest_class_is_named():
    class ViltForQuestionAnswer(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"Did you mean 'ViltForQuestionAnswering'\?"):
        pumer.apply(ViltForQuestionAnswer(), PuMer())


def test_a_supported_model_inside_another_is_pointed_out(model):
    with pytest.raises(
        ValueError, match="contains a ViltForQuestionAnswering: if it gives that pixel_values, pass"
    ):
        pumer.apply(nn.Sequential(model), PuMer())


@pytest.mark.parametrize(
    ("reducer", "settings", "message"),
    [
        (3, {}, "expected a reducer such as pumer.PuMer"),
        (Chain, {}, r"the settings .* do not fit chain"),
        (int, {}, "expected a reducer such as pumer.PuMer"),
        ("pummer", {}, r"no reducer is named 'pummer'.* Did you mean 'pumer'\?"),
        ({"reducer": "tomme"}, {}, r"no reducer is named 'tomme'.* Did you mean 'tome'\?"),
        ({"r": 8}, {}, "no reducer is named for the settings r: name it"),
        ({"reducer": "tome", "dept": 6}, {}, r"tome has no setting dept. Did you mean 'depth'\?"),
        ({"reducer": "tome", "r": None}, {}, r"reducer tome: r is None; expected"),
        ({"reducer": "tome", "r": "many"}, {}, "reducer tome: r is 'many'; expected"),
        (
            FastV(layer=99),
            {},
            r"fastv has layer=99, but the model has layers 0 to 3: give layer 1 to 4",
        ),
        (
            PuMer(layers=(1,)),
            {"attention": "flash"},
            "attention is one of sdpa, eager, not 'flash'",
        ),
        (
            PuMer(layers=(2, 5, 8)),
            {},
            r"reduces in layers \[5, 8\], but the model has layers 0 to 3",
        ),
        (Random(layers=(4,)), {}, r"reduces in layers \[4\]"),
        (Pool(layer=7), {}, r"pool has layer=7, but"),
        (ToMe(r=2, depth=12), {}, r"reduces in layers \[4, 5"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was(
    model, reducer, settings, message
):
    with pumer.reduced(model, matrix.REDUCERS["tome"]):
        with pytest.raises(ValueError, match=message):
            pumer.apply(model, reducer, **settings)
        assert pumer.active(model).reducer == matrix.REDUCERS["tome"]
    with pytest.raises(ValueError, match=message):
        pumer.apply(model, reducer, **settings)
    assert all("forward" not in vars(part) for part in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PuMer(prune=1), "prune is a ratio in"),
        (lambda: PuMer(merge=-0.1), "merge is a ratio in"),
        (lambda: PuMer(merge_text=1.5), "merge_text is a ratio in"),
        (lambda: PuMer(prune=0.5, merge=0.5), "leaves no image token"),
        (lambda: PuMer(prune=(0.1, 0.7), layers=(1, 2)), "prune 0.7 . merge 0.3 leaves no image"),
        (lambda: PuMer(prune=(0.1, 0.2), layers=(1, 2, 3)), "one for each of the 3 layers"),
        (lambda: PuMer(prune=(0.1, 0.2), merge=(0.1,) * 3), "different number of shares"),
        (lambda: PuMer(protect=1.0), "protect is a ratio"),
        (lambda: PuMer(smooth=0.5, score="qk"), "smooth averages shares of attention"),
        (lambda: PuMer(official=True, layers=(1,), weighted=True), "goes without weighted"),
        (lambda: PuMer(official=True, layers=(1, 2), merge=(0.1, 0.2)), "a tuple of shares"),
        (lambda: PuMer(layers=(-1, 2)), "cannot act before layer 0"),
        (lambda: PuMer(layers=(1.5,)), "layers are whole numbers"),
        (lambda: PuMer(official=True), "official=True needs `layers`"),
        (lambda: PuMer(layers="all"), "or 'all' with official=True"),
        (lambda: PuMer().reduces_at(2), "the layers of pumer depend on the model"),
        (lambda: PyramidDrop(keep=64), "keep is one number for each layer"),
        (lambda: PuMer(score="best"), "score is one of mean_head"),
        (lambda: PuMer(style="tip"), "only 'tome' without official"),
        (lambda: PuMer(layers=(2,), official=True, style="top"), "style is one of"),
        (lambda: ToMe(r=-1), "a number of tokens from 0"),
        (lambda: ToMe(r=(3, 2.0)), r"inflection .* lies in \[-1, 1\]"),
        (lambda: Random(prune=1.0), "prune is a ratio in"),
        (lambda: Uniform(layers=(-2,)), "layers are whole numbers"),
        (lambda: Pool(window=0), "at least one patch on a side"),
        (
            lambda: get("shrink"),
            "no reducer is named 'shrink'. There are .*compose, .*no-vision, none",
        ),
        (
            lambda: from_dict({"reducer": "tome", "speed": 2, "haste": 1}),
            "tome has no setting haste, speed. It has r",
        ),
        (lambda: register(NoVision), "a reducer named 'no-vision' is registered already"),
    ],
)
def test_settings_are_checked_when_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "reducer", [*matrix.REDUCERS.values(), *matrix.COMPOSED.values(), matrix.OFFICIAL]
)
def test_a_reducer_is_plain_data_and_back(reducer):
    assert from_dict(to_dict(reducer)) == reducer
    assert reducer.name in list_reducers()
    assert get(reducer.name) is type(reducer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
        (
            {"inputs_embeds": torch.ones(4, 12, 32)},
            "give exactly one of input_ids and inputs_embeds",
        ),
        ({"pixel_values": None}, "give exactly one of pixel_values and image_embeds"),
        (
            {"input_ids": torch.ones(3, 12, dtype=torch.long)},
            "3 texts and 4 images: the batch sizes must agree",
        ),
    ],
)
def test_inputs_are_checked_as_by_the_stock_model(model, changes, message):
    with pumer.reduced(model, matrix.REDUCERS["pumer"]), pytest.raises(ValueError, match=message):
        model(**(tiny.batch() | changes))


def test_pooling_what_is_no_grid_any_more_says_so(model):
    given = {"image_embeds": torch.ones(4, 10, 32), "pixel_mask": torch.ones(4, 10)}
    inputs = tiny.batch() | given | {"pixel_values": None}
    with pumer.reduced(model, Pool()), pytest.raises(ValueError, match="pooling needs all patches"):
        model(**inputs)


def test_applying_again_replaces_and_removing_twice_is_harmless():
    model = tiny.model()
    assert pumer.apply(model, matrix.REDUCERS["pumer"]) is model
    pumer.apply(model, matrix.REDUCERS["tome"])
    assert pumer.active(model).reducer == matrix.REDUCERS["tome"]
    assert pumer.remove(pumer.remove(model)) is model
    assert pumer.active(model) is None
    assert all("forward" not in vars(part) for part in model.modules())


def test_presets_fit_the_published_model():
    model = tiny.model(num_hidden_layers=12)
    for name in ("vilt-vqav2", "vilt-nlvr2", "vilt-snli-ve", "vilt-retrieval", "vilt-vqav2-even"):
        pumer.apply(model, name)
        with torch.no_grad():
            model(**tiny.batch())
        assert pumer.active(model).lengths[-1] < pumer.active(model).lengths[0]


def test_tracing_needs_a_reduction(model):
    with pytest.raises(ValueError, match="nothing reduces this model"), pumer.trace(model):
        pass


def test_a_trace_ends_with_its_block(model):
    with pumer.reduced(model, matrix.REDUCERS["uniform"]):
        with torch.no_grad(), pumer.trace(model) as steps:
            model(**tiny.batch())
            with pumer.trace(model) as inner:
                model(**tiny.batch())
        with torch.no_grad():
            model(**tiny.batch())
    assert [step.layer for step in steps] == [0, 1]
    assert len(inner) == 2
    assert steps[0].grid == (6, 8)
    assert steps[0].patch_BN.shape == (4, steps[0].text + 26)


@pytest.mark.parametrize(
    "reducer",
    [pumer.Random(prune=0.99), pumer.PuMer(prune=0.6, merge=0.3, layers=(0, 1, 2, 3))],
    ids=lambda r: r.name,
)
def test_one_patch_is_left_at_every_ratio(reducer):
    model = tiny.model()
    with pumer.reduced(model, reducer), torch.no_grad():
        assert model(**tiny.batch()).logits.isfinite().all()
        assert pumer.active(model).lengths[-1][1] == 2  # with [CLS]
        assert pumer.report(model).active


def test_a_reducer_that_would_leave_nothing_is_refused():
    model = tiny.model()
    # The published code keeps int(37 * 0.02) patches.
    with pytest.raises(ValueError, match="leaves no image token"):
        pumer.apply(model, pumer.DynamicViT(keep=0.02, layers=(0,), official=True))
    assert pumer.active(model) is None
    pumer.apply(model, pumer.NoVision())
