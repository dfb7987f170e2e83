"""How a plan for some tokens changes the whole layout, whose crops are one image, whose images are
one prompt's."""

from dataclasses import replace

import pytest
import tiny_llm
import torch
from hypothesis import given
from hypothesis import strategies as st

import pumer
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prefill import group_crops, match_images_to_placeholders
from pumer.adapters.decoder.prompt import CropGroups, ImageSpan, TokenLayout, inside_images
from pumer.adapters.decoder.reduce import lift_plan
from pumer.adapters.decoder.view import View
from pumer.reducers import Chain, Energy, FastV, Plan, Random


@st.composite
def views(draw):
    """A layout with empty slots at the left, a view of some of its tokens, and a plan for these."""
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    empty = [draw(st.integers(0, count - 1)) for _ in range(batch)]
    shown = [[at for at in range(first, count) if draw(st.booleans())] for first in empty]
    width = max(map(len, shown), default=0) + draw(st.integers(0, 1))
    slots = draw(st.integers(1, 4))
    goes = [[draw(st.integers(-1, slots - 1)) for _ in own] for own in shown]
    return batch, count, empty, shown, width, slots, goes


@given(views())
def test_a_plan_for_a_view_is_one_for_the_layout(drawn):
    batch, count, empty, shown, width, slots, goes = drawn
    at, valid = (
        torch.zeros(batch, width, dtype=torch.int64),
        torch.zeros(batch, width, dtype=torch.bool),
    )
    slot = torch.full((batch, width), -1)
    for row, own in enumerate(shown):
        at[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        valid[row, : len(own)] = True
        slot[row, : len(own)] = torch.tensor(goes[row], dtype=torch.int64)
    filled = torch.arange(count) >= torch.tensor(empty)[:, None]
    plan = Plan.merge(slot, torch.ones(batch, slots, dtype=torch.bool), torch.ones(batch, width))
    marks = torch.zeros(batch, count, dtype=torch.bool)
    index = torch.arange(count).expand(batch, -1)
    layout = TokenLayout(
        index,
        filled,
        marks,
        marks,
        marks,
        marks,
        filled.float(),
        ((0, 0),) * batch,
        unreduced=False,
    )

    expected = [groups_by_hand(count, empty[row], shown[row], goes[row]) for row in range(batch)]
    length = max(map(len, expected)) + 1
    placed = lift_plan(plan, View(None, at, valid), layout, length)
    sources = placed.sources()
    for row, groups in enumerate(expected):
        first = length - len(groups)
        assert placed.mask_BK[row].tolist() == [False] * first + [True] * len(groups)
        assert [
            sources[row, first + number].nonzero()[:, 0].tolist() for number in range(len(groups))
        ] == groups
        assert placed.index_BK[row, first:].tolist() == [min(group) for group in groups]
        for group in groups:
            assert placed.weight_BN[row, group].tolist() == pytest.approx(
                [1 / len(group)] * len(group)
            )
    after = layout.after(placed, ((0, 0),) * batch, gaps=True)
    assert after.sizes_BK.sum(1).tolist() == [float(sum(map(len, groups))) for groups in expected]
    spread = after.index_of_survivor(count)
    for row, groups in enumerate(expected):
        for token in range(count):
            before = [number for number, group in enumerate(groups) if min(group) <= token]
            if before:
                assert spread[row, token] == length - len(groups) + before[-1]


@given(views(), st.integers(0, 99))
def test_shares_in_several_slots_are_placed(drawn, seed):
    batch, count, empty, shown, width, slots, goes = drawn
    at, valid, slot = (torch.zeros(batch, width, dtype=torch.int64) for _ in range(3))
    slot = slot - 1
    for row, places in enumerate(shown):
        at[row, : len(places)] = torch.tensor(places, dtype=torch.int64)
        valid[row, : len(places)] = 1
        slot[row, : len(places)] = torch.tensor(goes[row], dtype=torch.int64)
    valid = valid.bool()
    plan = Plan.merge(slot, torch.ones(batch, slots, dtype=torch.bool), torch.ones(batch, width))
    generator = torch.Generator().manual_seed(seed)
    shares = torch.randn(batch, slots, width, generator=generator) * valid[:, None]
    shares = shares * plan.sources().any(2)[..., None]
    filled = torch.arange(count) >= torch.tensor(empty)[:, None]
    marks = torch.zeros(batch, count, dtype=torch.bool)
    index = torch.arange(count).expand(batch, -1)
    counts = ((0, 0),) * batch
    layout = TokenLayout(
        index, filled, marks, marks, marks, marks, filled.float(), counts, unreduced=False
    )
    placed = lift_plan(replace(plan, shares_BKN=shares), View(None, at, valid), layout, count + 1)

    x = torch.randn(batch, count, 3, generator=generator)
    found = replace(placed, index_BK=None).reduce(x)
    for row in range(batch):
        groups = groups_by_hand(count, empty[row], shown[row], goes[row])
        for number, group in enumerate(groups, start=count + 1 - len(groups)):
            expected = x[row, group[0]]
            if group[0] in shown[row]:
                into = goes[row][shown[row].index(group[0])]
                expected = shares[row, into] @ x[row, at[row]]
            torch.testing.assert_close(found[row, number], expected)


def groups_by_hand(count, empty, shown, goes):
    """What becomes one token, in order of the first members."""
    groups = [[token] for token in range(empty, count) if token not in shown]
    for slot in {slot for slot in goes if slot >= 0}:
        groups.append([token for token, own in zip(shown, goes, strict=True) if own == slot])
    return sorted(groups, key=min)


def test_images_of_a_batch_and_of_its_beams():
    images = [ImageSpan(3), ImageSpan(2), ImageSpan(4)]
    joined, sample_index = match_images_to_placeholders(images, [5, 0, 4])
    assert ([image.length for image in joined], sample_index) == ([3, 2, 4], [0, 0, 2])
    joined, sample_index = match_images_to_placeholders(images, [5, 5, 0, 0, 4, 4])
    assert ([image.length for image in joined], sample_index) == (
        [3, 2, 3, 2, 4, 4],
        [0, 0, 1, 1, 4, 5],
    )
    for wrong in ([4, 5], [5, 5], [9, 1], []):
        with pytest.raises(ValueError, match="placeholders"):
            match_images_to_placeholders(images, wrong)


def test_what_stands_between_placeholders_of_one_image():
    rows = [[5, 0, 0, 6, 0, 7, 0, 5], [0, 6, 0, 0, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5, 5]]
    ids = torch.tensor(rows)
    inside = inside_images(ids == 0, [3, 1, 3], 7)
    assert inside.nonzero().tolist() == [[0, 3], [1, 1]]  # 6, and not 7 between two images
    repeated = ids.repeat_interleave(2, 0)
    assert torch.equal(inside_images(repeated == 0, [3, 1, 3], 14), inside.repeat_interleave(2, 0))
    for lengths in ([3, 1], []):  # an error will follow
        assert not inside_images(ids == 0, lengths, 7).any()


def test_crops_of_one_image():
    image = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    crops = CropGroups.of(image, 2, 8, None)
    assert crops.joined_P.tolist() == [False, True, False, False]
    assert not crops.between_BS.any()
    # With tokens that say which crop is which: 9 is before the last crop of every image.
    ids = torch.tensor(
        [[7, 0, 0, 8, 0, 0, 9, 0, 0, 5, 9, 0, 0], [9, 0, 0, 5, 5, 5, 5, 7, 0, 0, 9, 0, 0]]
    )
    crops = CropGroups.of(ids == 0, 2, 14, ids)
    assert crops.joined_P.tolist() == [False, True, True, False, False, False, True]
    assert crops.between_BS[0].nonzero()[:, 0].tolist() == [3, 6]
    assert crops.between_BS[1].nonzero()[:, 0].tolist() == [10]
    images, sample_index = group_crops(
        [ImageSpan(2)] * 7, [0] * 4 + [1] * 3, crops.joined_P.tolist()
    )
    assert ([image.length for image in images], sample_index) == ([6, 2, 2, 4], [0, 0, 1, 1])


def test_crops_of_images_that_begin_alike():
    ids = torch.tensor([[9, 0, 0, 8, 0, 0, 9, 0, 0], [5, 5, 5, 7, 0, 0, 9, 0, 0]])
    crops = CropGroups.of(ids == 0, 2, 10, ids, from_first=True)
    assert crops.joined_P.tolist() == [False, True, False, False, True]
    assert crops.between_BS.nonzero().tolist() == [[0, 3], [1, 6]]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_one_reducer_before_and_one_inside(family):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2)))
    image = tiny_llm.batch(family, ((4, "i", 6),))["input_ids"].eq(tiny_llm.IMAGE).sum().item()
    chain = Chain((Random(prune=0.5), FastV(keep=0.5, layer=2)))
    with pumer.reduced(model, chain), torch.no_grad():
        alone = tiny_llm.alone(family, ((4, "i", 6),), 0)
        model(**alone)
        left = [length for _, length in pumer.active(model).lengths]
        assert left == [image // 2, image // 2, image // 4, image // 4, image // 4] or image % 4
        together = model(**inputs).logits
        assert pumer.report(model).active
        torch.testing.assert_close(
            together[:1, -alone["input_ids"].shape[1] :],
            model(**alone).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_budgets_that_the_data_decide():
    """Every image gets its own, the sequence is as short as the longest, and the host waits once
    for it."""
    model = tiny_llm.model("llava")
    layout = ((4, "i", 6), (2, "i", 3))
    batch = tiny_llm.batch("llava", layout)
    with pumer.reduced(model, Energy(tau=0.6)), torch.no_grad():
        cache = kv_cache.find(model(**batch))
        together = model(**batch).logits
        for row in range(2):
            one = tiny_llm.alone("llava", layout, row)
            alone = model(**one).logits
            torch.testing.assert_close(
                together[row : row + 1, -alone.shape[1] :], alone, rtol=1e-4, atol=1e-4
            )
    assert cache.layers[0].keys.shape[2] < batch["input_ids"].shape[1]
