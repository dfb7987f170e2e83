"""Merging and learned reducers: worked cases of their published code, and inputs at the edge of
what is sensible."""

from dataclasses import replace

import pytest
import torch
from calls import Largest

from pumer.costs.report import planned_lengths
from pumer.reducers import (
    EMBEDDINGS,
    Chain,
    DyMU,
    DynamicViT,
    NoVision,
    Plan,
    Pool,
    PuMer,
    Random,
    SmartTrim,
    Tokens,
    TokenShape,
    ToMe,
    Uniform,
)
from pumer.reducers.learned import keep_surest
from pumer.reducers.ops import blocks
from pumer.reducers.ops.budget import prune_then_merge
from pumer.reducers.ops.matching import bipartite

HEADS, CHANNELS = 2, 4
WIDTH = HEADS * CHANNELS
NAN, INF = float("nan"), float("inf")
BAD = (NAN, INF, -INF, 1e30, 0.0)
REDUCERS = {
    "tome": ToMe(r=4, depth=1),
    "tome-all": ToMe(r=1000, depth=1),
    "dymu": DyMU(thresholds=(0.3,)),
    "pumer": PuMer(prune=0.3, merge=0.4, merge_text=0.3, layers=(0,)),
    "dynamicvit": DynamicViT(keep=0.4, layers=(0,)),
    "smarttrim": SmartTrim(layers=(0,)),
    "random": Random(prune=0.6, layers=(0,)),
    "uniform": Uniform(prune=0.6, layers=(0,)),
    "pool": Pool(window=2, layer=0),
}
EVERY = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
MOST = {
    "tome": ToMe(r=1000, depth=1),
    "dymu": DyMU(thresholds=(-1.0,)),
    "pumer": PuMer(prune=0.98, merge=0.01, layers=(0,)),
    "dynamicvit": DynamicViT(keep=0.01, layers=(0,)),
    "smarttrim": SmartTrim(layers=(0,)),
    "random": Random(prune=0.99, layers=(0,)),
    "uniform": Uniform(prune=0.99, layers=(0,)),
    "pool": Pool(window=100, layer=0),
    "chain": Chain((Random(prune=0.99, layers=(0,)), Uniform(prune=0.99, layers=(1,)))),
}
"""At ratios that leave next to nothing."""


def tokens_of(counts, width, text=3, seed=0, part=None, dtype=torch.float32):
    """One row of tokens for each number of patches, padded to `width`; [CLS] in front of text and
    image."""
    generator = torch.Generator().manual_seed(seed)
    batch, count = len(counts), text + 1 + width
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[:, text + 1 :] = torch.arange(width) < torch.tensor(counts)[:, None]
    patch = (torch.arange(count) - text - 1).clamp_min(-1).expand(batch, -1)
    heads = (batch, HEADS, count, CHANNELS)
    return Tokens(
        mask_BN=mask,
        text=text,
        sizes_BN=torch.ones(batch, count),
        grid=(1, width),
        patch_BN=patch,
        states_BND=torch.randn(batch, count, WIDTH, generator=generator).to(dtype),
        queries_BHNC=torch.randn(heads, generator=generator).to(dtype),
        keys_BHNC=torch.randn(heads, generator=generator).to(dtype),
        part=part,
    )


def part_of(reducer, dtype=torch.float32):
    """New trained parts for layer 0, the same ones every time."""
    if reducer.traits.learned is None:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return reducer.traits.learned.parts(WIDTH, HEADS, 1, False)["0"].eval().to(dtype)


def poison(tokens, row, value, patches=slice(None)):
    """The tokens with a value in all states, queries and keys of some patches of a row."""
    first = tokens.text + 1
    states, queries, keys = (
        x.clone() for x in (tokens.states_BND, tokens.queries_BHNC, tokens.keys_BHNC)
    )
    states[row, first:][patches] = value
    for x in (queries, keys):
        x[row, :, first:][:, patches] = value
    return replace(tokens, states_BND=states, queries_BHNC=queries, keys_BHNC=keys)


@torch.no_grad()
def plan_of(reducer, tokens):
    return reducer.plan(tokens)


def image_groups(plan, tokens, row=0):
    """Groups of more than one patch, numbered from 0."""
    slots = plan.slot_BN[row, tokens.text + tokens.num_prefix_tokens :]
    groups = [(slots == slot).nonzero()[:, 0].tolist() for slot in slots.unique()]
    return [group for group in groups if len(group) > 1]


def check(plan, tokens, reducer):
    """Slots in range, lengths as promised, the image never empty, padding nowhere, shares that sum
    to one."""
    count = tokens.mask_BN.shape[1]
    text, image = reducer.lengths(
        TokenShape(
            tokens.text, count - tokens.text, tokens.layer, tokens.num_prefix_tokens, tokens.grid
        )
    )
    assert plan.slots == text + image
    assert plan.mask_BK.shape == (len(tokens.mask_BN), text + image)
    assert int(plan.slot_BN.min()) >= -1
    assert int(plan.slot_BN.max()) < plan.slots
    sources = plan.sources() & plan.mask_BK[..., None]
    assert not (sources & ~tokens.mask_BN[:, None]).any()
    assert torch.equal(sources.any(2), plan.mask_BK)
    shares = plan.total(plan.weight_BN)[plan.mask_BK]
    torch.testing.assert_close(shares, torch.ones_like(shares))
    assert plan.mask_BK[:, text + tokens.num_prefix_tokens :].any(1).all()


# --- worked cases of the published code ---


def test_the_class_token_counts_when_tome_splits_tokens():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 17, 8, generator=generator)
    tokens = Tokens(torch.ones(1, 17, dtype=torch.bool), 0, torch.ones(1, 17), keys_BHNC=keys)
    groups = image_groups(ToMe(r=4, depth=1).plan(tokens), tokens)
    assert sorted(groups) == [[6, 7], [8, 11], [9, 10], [13, 14]]


def test_dymu_merges_half_of_an_odd_number_at_most():
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 7, 4) * 0.1 + 1
    tokens = Tokens(
        torch.ones(1, 7, dtype=torch.bool), 0, torch.ones(1, 7), num_prefix_tokens=0, keys_BHNC=keys
    )
    assert int(DyMU(thresholds=(0.5,)).plan(tokens).mask_BK.sum()) == 4


@pytest.mark.parametrize(("patches", "left"), [(577, (403, 282, 197)), (196, (137, 96, 67))])
def test_dynamicvit_counts_from_the_start(patches, left):
    reducer = DynamicViT(keep=0.7, layers=(0, 1, 2))
    lengths = planned_lengths(reducer, 3, 5, 1 + patches)
    assert [image - 1 for _, image in lengths] == [patches, *left]


def test_dynamicvit_counts_every_row_from_its_own_start():
    reducer = DynamicViT(keep=0.7, layers=(0, 1))
    tokens = replace(tokens_of((137, 105), 137), layer=1, part=part_of(reducer))
    entered = torch.arange(196) < torch.tensor([[196], [150]])
    plan = plan_of(reducer, replace(tokens, entered_BI=entered))
    assert plan.slots == tokens.text + 1 + 96
    assert (
        (plan.mask_BK[:, tokens.text + 1 :].sum(1)).tolist() == [96, int(150 * 0.7**2)] == [96, 73]
    )


# --- long texts ---


def long_tokens(words, num_prefix_tokens, dtype=torch.float32):
    """One sample of that many words and 16 patches; keys that are alike here and there."""
    generator = torch.Generator().manual_seed(words)
    count = words + 16 + num_prefix_tokens
    keys = torch.randn(1, 1, count, CHANNELS, generator=generator).round(decimals=1)
    return Tokens(
        mask_BN=torch.arange(count)[None] != words - 1,  # a word of padding
        text=words,
        sizes_BN=torch.ones(1, count),
        num_prefix_tokens=num_prefix_tokens,
        states_BND=torch.randn(1, count, WIDTH, generator=generator).to(dtype),
        queries_BHNC=keys,
        keys_BHNC=keys,
    )


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_merging_8000_words_takes_memory_linear_in_them(num_prefix_tokens):
    reducer = PuMer(prune=0.3, merge=0.3, merge_text=0.3, layers=(0,))
    sizes = []
    for words in (4000, 8000):
        tokens = long_tokens(words, num_prefix_tokens, torch.bfloat16)
        with Largest() as largest:
            plan = reducer.plan(tokens)
            states = plan.reduce(tokens.states_BND)
        sizes.append(largest.size)
        assert states.shape[1] == sum(
            reducer.lengths(TokenShape(words, 16 + num_prefix_tokens, 0, num_prefix_tokens))
        )
    assert max(sizes) <= 4 * blocks.BLOCK, [size / 2**20 for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_blocks_merge_the_same_tokens_into_the_same_states(dtype, monkeypatch):
    reducer = PuMer(prune=0, merge=0.3, merge_text=0.4, layers=(0,))
    tokens = long_tokens(203, 1, dtype)
    expected = reducer.plan(tokens)
    states = expected.reduce(tokens.states_BND)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    assert len(blocks.row_blocks(101, 101, CHANNELS)) == 26
    plan = reducer.plan(tokens)
    assert torch.equal(plan.slot_BN, expected.slot_BN)
    assert torch.equal(plan.weight_BN, expected.weight_BN)
    torch.testing.assert_close(plan.reduce(tokens.states_BND), states)


# --- values that are not finite, huge, or all the same ---


@EVERY
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "patches", [slice(None), slice(1, 4), slice(0, 1)], ids=["all", "some", "one"]
)
def test_a_bad_row_is_planned_and_leaves_the_others_alone(reducer, value, patches):
    tokens = tokens_of((7, 9, 5), 9, part=part_of(reducer))
    clean = plan_of(reducer, tokens)
    bad = poison(tokens, 1, value, patches)
    plan = plan_of(reducer, bad)
    check(plan, bad, reducer)
    for row in (0, 2):
        assert torch.equal(plan.slot_BN[row], clean.slot_BN[row])
        assert torch.equal(plan.weight_BN[row], clean.weight_BN[row])
        assert torch.equal(plan.mask_BK[row], clean.mask_BK[row])
        assert torch.equal(plan.reduce(bad.states_BND)[row], clean.reduce(tokens.states_BND)[row])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_many_tokens_are_merged_as_promised_whatever_the_keys(value, num_prefix_tokens, dtype):
    counts, width = torch.tensor([9, 8, 5, 1, 0]), 9
    keys = torch.randn(len(counts), width, 4, generator=torch.Generator().manual_seed(0))
    keys[:, :6] = value
    valid = torch.arange(width) < counts[:, None]
    for asked in (0, 1, 3, 100):
        merged = (counts // 2).clamp_max(asked)
        plan = bipartite(
            keys.to(dtype),
            valid,
            asked,
            width - min(asked, width // 2),
            num_prefix_tokens=num_prefix_tokens,
        )
        assert plan.mask_BK.sum(1).tolist() == (counts - merged).tolist()
        assert torch.equal(plan.slot_BN >= 0, valid)
        assert int(plan.slot_BN.max()) < plan.slots


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-13, 1e18, 1e30])
def test_only_the_direction_of_keys_counts(scale):
    keys = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 12, dtype=torch.bool)
    expected, scaled = (bipartite(each, valid, 4, 8) for each in (keys, keys * scale))
    assert torch.equal(scaled.slot_BN, expected.slot_BN)


def test_what_is_not_finite_is_merged_last():
    keys = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    keys[0, [2, 3]] = torch.tensor([NAN, INF])[:, None]
    plan = bipartite(keys, torch.ones(1, 12, dtype=torch.bool), 5, 7)
    members = plan.sources()[0]
    for bad in (2, 3):
        assert int(members[:, bad].sum()) == 1
        assert int(members[members[:, bad]].sum()) == 1


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(reducer, dtype):
    tokens = tokens_of((7, 9, 5), 9, part=part_of(reducer, dtype), dtype=dtype)
    check(plan_of(reducer, tokens), tokens, reducer)


# --- next to nothing ---


@pytest.mark.parametrize("reducer", MOST.values(), ids=MOST)
@pytest.mark.parametrize("counts", [(1,), (1, 1), (1, 4, 2), (30, 1)])
def test_one_patch_stays_at_every_ratio(reducer, counts):
    part = part_of(reducer)
    if isinstance(reducer, SmartTrim):  # that wants none of them
        with torch.no_grad():
            part["image"].decision.bias.copy_(torch.tensor([-50.0, 50.0]))
    tokens = tokens_of(counts, max(counts), part=part)
    plan = plan_of(reducer, tokens)
    check(plan, tokens, reducer)
    lengths = planned_lengths(reducer, 3, tokens.text, 1 + max(counts), tokens.grid)
    assert all(image >= 2 for _, image in lengths)
    for row, count in enumerate(counts):
        alone = tokens_of((count,), count)
        cut = torch.cat([torch.arange(tokens.text + 1), tokens.text + 1 + torch.arange(count)])
        alone = replace(
            alone,
            grid=tokens.grid,
            states_BND=tokens.states_BND[row : row + 1, cut],
            queries_BHNC=tokens.queries_BHNC[row : row + 1, :, cut],
            keys_BHNC=tokens.keys_BHNC[row : row + 1, :, cut],
            part=part,
        )
        one = plan_of(reducer, alone)
        assert torch.equal(one.slot_BN[0] >= 0, plan.slot_BN[row, cut] >= 0)


@EVERY
@pytest.mark.parametrize("structure", [0, 1])
def test_an_image_without_patches_is_left_alone(reducer, structure):
    """With and without its [CLS], as after `NoVision`."""
    full = tokens_of((0, 0), 0, part=part_of(reducer))
    end = full.text + structure
    tokens = replace(
        full,
        mask_BN=full.mask_BN[:, :end],
        sizes_BN=full.sizes_BN[:, :end],
        grid=None if structure == 0 else (0, 0),
        patch_BN=full.patch_BN[:, :end],
        states_BND=full.states_BND[:, :end],
        queries_BHNC=full.queries_BHNC[:, :, :end],
        keys_BHNC=full.keys_BHNC[:, :, :end],
    )
    if isinstance(reducer, Pool):
        tokens = replace(tokens, grid=(0, 0))
    assert reducer.lengths(TokenShape(9, structure, 0, 1, tokens.grid))[1] == structure
    plan = plan_of(reducer, tokens)
    assert plan.slots == sum(reducer.lengths(TokenShape(tokens.text, structure, 0, 1, tokens.grid)))
    assert (plan.slot_BN[:, tokens.text :] >= 0).all()


def test_no_vision_leaves_no_image_token():
    tokens = replace(tokens_of((3, 1), 3), layer=EMBEDDINGS)
    plan = NoVision().plan(tokens)
    assert plan.slots == tokens.text
    assert (plan.slot_BN[:, tokens.text :] == -1).all()


@pytest.mark.parametrize("prune", [0.0, 0.5, 0.6, 0.9, 0.99])
def test_pruning_and_merging_leave_one_token(prune):
    counts = torch.arange(60)
    kept, merged = prune_then_merge(counts, prune, 0.99 - prune)
    left = kept - merged
    assert (left[1:] >= 1).all()
    assert left[0] == 0
    assert (left.diff() >= 0).all()


# --- what these stand on ---


def test_of_more_marks_than_slots_the_first_count():
    plan = Plan.keep(torch.tensor([[True, False, True, True], [False, False, True, False]]), 2)
    assert plan.slot_BN.tolist() == [[0, -1, 1, -1], [-1, -1, 0, -1]]
    assert plan.mask_BK.tolist() == [[True, True], [True, False]]
    assert plan.index_BK.tolist() == [[0, 2], [2, 0]]


def test_a_dropped_token_comes_back_as_zeros_whatever_stands_in_slot_0():
    plan = Plan.keep(torch.tensor([[True, False, True]]), 2)
    assert plan.expand(torch.tensor([[NAN, 2.0]]))[0, 1:].tolist() == [0.0, 2.0]
    assert plan.expand(torch.tensor([[[INF], [2.0]]]))[0, 1:, 0].tolist() == [0.0, 2.0]
    assert plan.expand(torch.tensor([[True, True]])).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["summed", "by a matrix product"]
)
def test_values_never_leave_their_sample_nor_padding_and_what_is_dropped(dtype):
    slots = torch.tensor([[0, 0, 1, 2], [0, -1, 1, 2]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    plan = Plan.merge(slots, mask, torch.ones(2, 4))
    x = torch.arange(8, dtype=dtype).view(2, 4, 1)
    bad = x.clone()
    bad[0, 2] = NAN  # in a slot of its own
    assert torch.equal(plan.reduce(bad)[1], plan.reduce(x)[1])
    if dtype == torch.float32:
        assert torch.equal(plan.reduce(bad)[0, 0], plan.reduce(x)[0, 0])
    bad = x.clone()
    bad[0, 3] = bad[1, 1] = NAN  # padding, and dropped
    assert torch.equal(plan.reduce(bad)[mask], plan.reduce(x)[mask])
    assert torch.equal(plan.reduce(bad[..., 0])[mask], plan.reduce(x[..., 0])[mask])
    fractional = replace(plan, mask_BK=mask.float())
    assert torch.equal(fractional.reduce(x), fractional.matrix(dtype) @ x)
    nothing = Plan.merge(torch.full((2, 4), -1), mask[:, :0], torch.ones(2, 4))
    assert nothing.reduce(x).shape == (2, 0, 1)


def test_the_surest_of_those_that_are_there_stays():
    logits = torch.tensor(
        [[[0.0, 9.0], [0.0, 2.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]]]
    )
    logits = torch.cat([logits, torch.full((1, 3, 2), NAN)]).requires_grad_()
    there = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    decided = (logits[..., 0] > logits[..., 1]).float() + (
        logits.sum(-1) - logits.sum(-1).detach()
    ).nan_to_num()
    kept = keep_surest(decided, logits, there)
    assert kept.tolist()[:2] == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert kept[2].sum() == 1
    # Where something stays, nothing is added, though chance decided against the surest.
    drawn = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(keep_surest(drawn, logits[:1], there[:1]), drawn)
    assert keep_surest(decided[:, :0], logits[:, :0], there[:, :0]).shape == (3, 0)
    (gradient,) = torch.autograd.grad(kept[:2].sum(), logits)
    assert (gradient[:2] == 1).all()
