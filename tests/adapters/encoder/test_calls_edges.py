"""Edges of an encoder's input: values that are no numbers, pictures of one patch, masks that do not
fit."""

import calls
import matrix
import pytest
import tiny
import torch
from calls import near

import halves
import pumer
from pumer import PuMer

OFFICIAL = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(1, 2), official=True)
CASES = matrix.on_every_family(official=OFFICIAL)
NAN = torch.tensor(float("nan"))
VALUES = {"nan": float("nan"), "inf": float("inf"), "huge": 1e38}
SPOILT = [
    pytest.param(value, everywhere, id=f"{name} in {'all pixels' if everywhere else 'one pixel'}")
    for name, value in VALUES.items()
    for everywhere in (False, True)
]
"""What pixels of a picture may be, and whether all of them are."""


def with_value(batch, row, value, everywhere):
    """A batch in which one pixel of one picture, or all of them, have a value."""
    pixels = batch["pixel_values"].clone()
    real = pixels[row, :, :32, :32]
    if everywhere:
        real[:] = value
    else:
        real[0, 3, 5] = value
    return batch | {"pixel_values": pixels}


@pytest.mark.parametrize(
    ("value", "everywhere"), halves.sweep(SPOILT, ("nan in one pixel", "huge in all pixels"))
)
@pytest.mark.parametrize(("kind", "reducer"), CASES)
def test_a_value_that_is_no_number_stays_in_its_row(kind, reducer, value, everywhere):
    model, batch = tiny.model(kind), tiny.batch(kind)
    spoilt = with_value(batch, 1, value, everywhere)
    others = [0, 2, 3]
    with pumer.reduced(model, reducer):
        clean = tiny.logits(model, batch)
        logits = tiny.logits(model, spoilt)
        if (
            not reducer.traits.dynamic_length
        ):  # where the data decide, a row's length is its own business
            lengths = pumer.active(model).lengths
            tiny.logits(model, batch)
            assert pumer.active(model).lengths == lengths
    near(logits[others], clean[others])


@pytest.mark.parametrize(("kind", "reducer"), CASES)
def test_words_whose_embedding_is_no_number(kind, reducer):
    model, batch = tiny.model(kind), tiny.batch(kind)
    words = model.vilt.embeddings.text_embeddings if "Vilt" in kind else model.base_model.text_model
    words = getattr(words, "embeddings", words).word_embeddings
    others = [0, 2, 3]
    with pumer.reduced(model, reducer):
        clean = tiny.logits(model, batch)
        hook = words.register_forward_hook(
            lambda module, args, states: states.index_put((torch.tensor(1), torch.tensor(2)), NAN)
        )
        logits = tiny.logits(model, batch)
        hook.remove()
    near(logits[others], clean[others])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pumer", "tome", "sparsevlm", "dart", "divprune"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_number_stays_in_its_row_compiled(family, name):
    kind = tiny.FAMILIES[family]
    model, batch = tiny.model(kind), tiny.batch(kind)
    spoilt = with_value(batch, 1, float("nan"), False)
    others = [0, 2, 3]
    torch._dynamo.reset()
    with pumer.reduced(model, matrix.REDUCERS[name], trim=False):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        clean = tiny.logits(compiled, batch)
        logits = tiny.logits(compiled, spoilt)
        near(clean, tiny.logits(model, batch))
    near(logits[others], clean[others])


# --- one patch ---


def one_patch(kind, rows=4):
    """Pictures of one patch each; of ViLT's, the last one is padded to two by two."""
    if kind in tiny.TWO_STREAMS:
        return tiny.batch(kind, size=(16, 16), rows=rows)
    batch = tiny.batch(kind, rows=rows)
    pixels, mask = batch["pixel_values"][..., :16, :16], batch["pixel_mask"][..., :16, :16]
    return batch | {"pixel_values": pixels.clone(), "pixel_mask": mask.clone()}


@pytest.mark.parametrize(("kind", "reducer"), matrix.on_every_family())
def test_a_picture_of_one_patch(kind, reducer):
    """It keeps that patch, unless none was asked for, and its row is that of the same sample
    alone."""
    model, batch = tiny.model(kind), one_patch(kind)
    with pumer.reduced(model, reducer):
        logits = tiny.logits(model, batch)
        _, image = pumer.active(model).lengths[-1]
        assert logits.isfinite().all()
        assert image >= 2 or isinstance(reducer, pumer.NoVision)
        for row in range(2):
            near(logits[row], tiny.logits(model, tiny.alone(batch, row))[0])


@pytest.mark.parametrize("reducer", matrix.REDUCERS.values(), ids=matrix.REDUCERS)
def test_a_picture_of_one_patch_among_larger_ones(reducer):
    """ViLT's pictures have sizes of their own; each keeps a patch."""
    kind = tiny.FAMILIES["ViLT"]
    model, batch = tiny.model(kind), tiny.batch(kind)
    small = batch["pixel_mask"].clone()
    small[1] = 0
    small[1, :16, :16] = 1
    batch |= {"pixel_mask": small, "pixel_values": batch["pixel_values"] * small[:, None]}
    with pumer.reduced(model, reducer):
        logits = tiny.logits(model, batch)
        near(logits[1], tiny.logits(model, tiny.alone(batch, 1))[0])
        with pumer.trace(model) as steps:
            tiny.logits(model, batch)
    assert logits.isfinite().all()
    if not isinstance(reducer, pumer.NoVision):
        for step in steps:
            mask = step.plan.mask_BK[1]
            assert mask.sum() >= 3  # a word at least, [CLS] of the picture and a patch


@pytest.mark.parametrize("ratio", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_high_ratios_leave_a_patch(family, ratio):
    kind = tiny.FAMILIES[family]
    model, batch = tiny.model(kind), tiny.batch(kind)
    reducers = [
        pumer.Random(prune=ratio),
        pumer.Uniform(prune=ratio),
        pumer.DivPrune(keep=1 - ratio),
        pumer.PuMer(prune=ratio, merge=0, merge_text=0, layers=(1,)),
        pumer.DynamicViT(keep=1 - ratio, layers=(0,)),
    ]
    for reducer in reducers:
        with pumer.reduced(model, reducer):
            tiny.logits(model, batch)
            assert pumer.active(model).lengths[-1][1] >= 2, reducer.name


# --- shapes that do not fit ---


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mask_of_another_length_than_the_words(family):
    """It would cut the question silently."""
    kind = tiny.FAMILIES[family]
    model, batch = tiny.model(kind), tiny.batch(kind)
    mask = batch["attention_mask"]
    longer = torch.nn.functional.pad(mask, (0, 2), value=1)
    for reducer in calls.PLACES.values():
        for trim in (True, False):
            with pumer.reduced(model, reducer, trim=trim):
                for wrong in (mask[:, :-1], mask[:, :4], longer, mask[0]):
                    with pytest.raises(ValueError, match="attention_mask"):
                        tiny.logits(model, batch | {"attention_mask": wrong})
                tiny.logits(model, batch)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_picture_without_a_patch(family):
    kind = tiny.FAMILIES[family]
    model, batch = tiny.model(kind), tiny.batch(kind)
    empty = batch | {
        "pixel_values": batch["pixel_values"][..., :0],
        "pixel_mask": batch["pixel_mask"][..., :0],
    }
    with pumer.reduced(model, calls.PLACES["inside"]):
        with pytest.raises((ValueError, RuntimeError)):
            tiny.logits(model, empty)
        tiny.logits(model, batch)
