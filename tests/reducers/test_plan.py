"""Plans: what holds for every reducer on any tokens, and slow loops that say what matching and
PuMer mean."""

from dataclasses import dataclass, replace

import matrix
import pytest
import slow
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pumer.reducers import Plan, PuMer, Tokens, TokenShape
from pumer.reducers.ops.budget import merge_schedule, portion, prune_then_merge
from pumer.reducers.ops.matching import bipartite

REDUCERS = [
    *matrix.REDUCERS.items(),
    *((f"{name} at 0", reducer) for name, reducer in matrix.IDENTITIES.items()),
]
HEADS, CHANNELS = 2, 4


@dataclass
class Sample:
    """One text and picture: lengths without padding, [CLS] included in the text, not in the
    picture."""

    text: int
    rows: int
    columns: int

    @property
    def image(self):
        return self.rows * self.columns


@st.composite
def batches(draw):
    """Samples of several sizes, and how much padding stands behind the longest of them."""
    sample = st.builds(Sample, st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
    return (
        draw(st.lists(sample, min_size=1, max_size=3)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 10**6)),
    )


def tokens_of(samples, padding, seed):
    """The token axis of a batch as an adapter hands it over, one `Tokens` for all samples
    together."""
    text = max(sample.text for sample in samples) + padding
    grid = max(sample.rows for sample in samples), max(sample.columns for sample in samples)
    image = 1 + grid[0] * grid[1]
    mask = torch.zeros(len(samples), text + image, dtype=torch.bool)
    patch = torch.full(mask.shape, -1)
    for row, sample in enumerate(samples):
        mask[row, : sample.text] = True
        mask[row, text : text + 1 + sample.image] = True
        inside = torch.zeros(grid, dtype=torch.bool)
        inside[: sample.rows, : sample.columns] = True
        # Real patches first, as the adapter orders them.
        patch[row, text + 1 :] = (~inside.flatten()).to(torch.uint8).argsort(stable=True)
    generator = torch.Generator().manual_seed(seed)
    heads = (len(samples), HEADS, text + image, CHANNELS)
    return Tokens(
        mask_BN=mask,
        text=text,
        sizes_BN=torch.randint(1, 4, mask.shape, generator=generator).float(),
        grid=grid,
        patch_BN=patch,
        states_BND=torch.randn(*mask.shape, HEADS * CHANNELS, generator=generator),
        queries_BHNC=torch.randn(heads, generator=generator),
        keys_BHNC=torch.randn(heads, generator=generator),
    )


def cut(tokens, row, sample):
    """The tokens of one sample without padding."""
    keep = tokens.mask_BN[row]
    here = torch.arange(sample.image).view(sample.rows, sample.columns).flatten()
    return Tokens(
        mask_BN=tokens.mask_BN[row : row + 1, keep],
        text=sample.text,
        sizes_BN=tokens.sizes_BN[row : row + 1, keep],
        layer=tokens.layer,
        grid=(sample.rows, sample.columns),
        patch_BN=torch.cat([torch.full((sample.text + 1,), -1), here])[None],
        states_BND=tokens.states_BND[row : row + 1, keep],
        queries_BHNC=tokens.queries_BHNC[row : row + 1, :, keep],
        keys_BHNC=tokens.keys_BHNC[row : row + 1, :, keep],
        part=tokens.part,
    )


def at(tokens, layer, reducer):
    """The tokens in another layer, with what a learned reducer has trained for it."""
    part = None
    if reducer.traits.learned:
        part = reducer.traits.learned.parts(HEADS * CHANNELS, HEADS, 4, False)[str(layer)].eval()
    return replace(tokens, layer=layer, part=part)


def groups(plan, row, kept=None):
    """Which source tokens each filled slot of a row holds; sources are counted among the `kept`
    ones."""
    numbers = torch.arange(plan.slot_BN.shape[1]) if kept is None else kept.long().cumsum(0) - 1
    slots = plan.mask_BK[row].nonzero()[:, 0].tolist()
    return [frozenset(numbers[plan.slot_BN[row] == slot].tolist()) for slot in slots]


A_FEW = settings(max_examples=15)
"""For every reducer; `test_fuzz_reducers` holds each to the same on many more batches."""

# --- what holds for every plan ---


@pytest.mark.parametrize(
    "reducer", [reducer for _, reducer in REDUCERS], ids=[name for name, _ in REDUCERS]
)
@A_FEW
@given(batch=batches())
def test_a_plan_moves_every_token_once_and_keeps_padding_behind(reducer, batch):
    for layer in reducer.layers or (0,):
        tokens = at(tokens_of(*batch), layer, reducer)
        plan = reducer.plan(tokens)
        batch_size, count = tokens.mask_BN.shape
        text, image = reducer.lengths(
            TokenShape(tokens.text, count - tokens.text, layer, grid=tokens.grid)
        )
        assert plan.slots == text + image
        assert plan.slot_BN.shape == (batch_size, count)
        assert int(plan.slot_BN.min()) >= -1
        assert int(plan.slot_BN.max()) < plan.slots

        # Of the real tokens, the text goes to the text's slots and the image to the image's.
        for row in range(batch_size):
            for where, low, high in (
                (slice(0, tokens.text), 0, text),
                (slice(tokens.text, None), text, text + image),
            ):
                slots = plan.slot_BN[row, where][tokens.mask_BN[row, where]]
                assert ((slots == -1) | (slots >= low) & (slots < high)).all()
                # Filled slots come first, then empty ones.
                filled = plan.mask_BK[row, low:high]
                assert torch.equal(filled, filled.sort(descending=True, stable=True).values)
        # Real tokens in filled slots only, and nothing else in them.
        real = plan.sources() & tokens.mask_BN[:, None]
        padded = plan.sources() & ~tokens.mask_BN[:, None]
        assert torch.equal(real.any(2), plan.mask_BK)
        assert not (padded & plan.mask_BK[..., None]).any()

        # The shares of a filled slot sum to one; sizes are neither made nor lost.
        shares = plan.total(plan.weight_BN)
        torch.testing.assert_close(shares[plan.mask_BK], torch.ones_like(shares[plan.mask_BK]))
        sizes = tokens.sizes_BN * tokens.mask_BN
        dropped = (sizes * (plan.slot_BN == -1)).sum(1)
        torch.testing.assert_close(plan.total(sizes).sum(1) + dropped, sizes.sum(1))

        # [CLS] of either modality stays where it is, and alone.
        if not reducer.traits.drops_image:
            for token, slot in ((0, 0), (tokens.text, text)):
                assert (plan.slot_BN[:, token] == slot).all()
                assert (plan.sources()[:, slot].sum(1) == 1).all()


@pytest.mark.parametrize("reducer", matrix.REDUCERS.values(), ids=matrix.REDUCERS)
@A_FEW
@given(batch=batches())
def test_a_row_of_a_batch_is_planned_as_it_would_be_alone(reducer, batch):
    for layer in reducer.layers or (0,):
        tokens = at(tokens_of(*batch), layer, reducer)
        plan = reducer.plan(tokens)
        for row, sample in enumerate(batch[0]):
            one = reducer.plan(cut(tokens, row, sample))
            assert groups(plan, row, tokens.mask_BN[row]) == groups(one, 0)


@st.composite
def plans(draw, count):
    """Any selection or merging of `count` tokens, for a batch of two."""
    slots = draw(st.integers(1, count))
    slot = st.lists(st.integers(-1, slots - 1), min_size=count, max_size=count)
    slot_BN = torch.tensor([draw(slot), draw(slot)])
    if draw(st.booleans()):
        return Plan.keep(slot_BN >= 0, count)
    sizes = torch.tensor(
        [draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)) for _ in range(2)]
    )
    plan = Plan.merge(slot_BN, torch.ones(2, slots, dtype=torch.bool), sizes.float())
    return several_slots(plan, draw(st.integers(0, 99))) if draw(st.booleans()) else plan


def several_slots(plan, seed):
    """The plan with random shares of every source in every slot that stands for something."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(plan.sources().shape, generator=generator) * plan.sources().any(2)[..., None]
    return replace(plan, index_BK=None, shares_BKN=plan.matrix() + more)


@given(data=st.data(), text=st.integers(0, 5), image=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_a_plan_without_its_empty_slots_is_the_same(data, text, image, seed):
    halves = [
        Plan.keep(
            torch.tensor(
                data.draw(
                    st.lists(
                        st.lists(st.booleans(), min_size=count, max_size=count),
                        min_size=2,
                        max_size=2,
                    )
                ),
                dtype=torch.bool,
            ).view(2, count),
            count,
        )
        for count in (text, image)
    ]
    plan = Plan.side_by_side(halves)
    lengths = tuple(int(half.mask_BK.sum(1).max()) for half in halves)
    assume(sum(lengths))
    for short in (plan.cut(text, lengths), replace(plan, index_BK=None).cut(text, lengths)):
        assert short.slots == sum(lengths)
        x = torch.randn(2, text + image, 3, generator=torch.Generator().manual_seed(seed))
        long = filled(plan, plan.reduce(x))
        torch.testing.assert_close(
            filled(short, short.reduce(x)),
            torch.cat([long[:, : lengths[0]], long[:, text : text + lengths[1]]], 1),
        )
        torch.testing.assert_close(short.expand(short.reduce(x)), plan.expand(plan.reduce(x)))


@given(data=st.data(), count=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_two_plans_in_one(data, count, seed):
    first = data.draw(plans(count))
    second = data.draw(plans(first.slots))
    both = first.then(second)
    x = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        filled(both, both.reduce(x)), filled(both, second.reduce(filled(first, first.reduce(x))))
    )
    sizes = torch.ones(2, count)
    torch.testing.assert_close(both.total(sizes), second.total(first.total(sizes)))
    y = torch.randn(2, both.slots, 3)
    torch.testing.assert_close(both.expand(y), first.expand(second.expand(y)))
    assert torch.equal(both.sources(), (second.sources().float() @ first.sources().float()) > 0)


def filled(plan, x):
    """States of a plan's slots with the empty ones zero: what stands there is anybody's guess."""
    return x * plan.sources().any(2)[..., None]


@given(data=st.data(), count=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_expanding_a_selection_gives_back_what_was_kept(data, count, seed):
    kept = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(2)]
    )
    plan = Plan.keep(kept, max(1, int(kept.sum(1).max())))
    x = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(plan.expand(plan.reduce(x)), x * kept[..., None])
    assert torch.equal(plan.expand(plan.reduce(x[..., 0])), x[..., 0] * kept)
    # The same by matrix product, which plans that merge take.
    torch.testing.assert_close(plan.matrix() @ x, filled(plan, plan.reduce(x)))
    assert torch.equal(Plan.select(plan.index_BK, plan.mask_BK, count).slot_BN, plan.slot_BN)


@given(data=st.data(), count=st.integers(1, 6))
def test_plans_side_by_side(data, count):
    left, right = data.draw(plans(count)), data.draw(plans(count))
    both = Plan.side_by_side([left, right])
    x = torch.randn(2, 2 * count, 3)
    parts = [
        filled(plan, plan.reduce(half))
        for plan, half in ((left, x[:, :count]), (right, x[:, count:]))
    ]
    torch.testing.assert_close(filled(both, both.reduce(x)), torch.cat(parts, 1))
    assert both.slots == left.slots + right.slots


@given(data=st.data(), count=st.integers(1, 6))
def test_parts_of_a_plan(data, count):
    """Of plans that drop, merge, and have a source enter several slots."""
    plan, x = data.draw(plans(count)), torch.randn(2, 3 + count, 3)
    both = Plan.side_by_side([Plan.identity(torch.ones(2, 3, dtype=torch.bool)), plan])
    expected = filled(plan, plan.reduce(x[:, 3:]))
    tail, head = both.tail(3), both.head(3, 3)
    torch.testing.assert_close(filled(tail, tail.reduce(x[:, 3:])), expected)
    torch.testing.assert_close(head.reduce(x[:, :3]), x[:, :3])
    rows = [both.rows(slice(row, row + 1)) for row in range(2)]
    for again in (Plan.stack(rows), both.to(torch.device("cpu")), both.cut(3, (3, plan.slots))):
        torch.testing.assert_close(again.matrix(), both.matrix())
        torch.testing.assert_close(again.reduce(x), both.reduce(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_may_hold_anything(dtype):
    """Slots of nothing but padding, and padding that goes nowhere, as a matrix product would
    spread."""
    text = Plan.identity(torch.tensor([[True, True, False]]))
    image = Plan.merge(torch.tensor([[0, 1, 0, -1]]), torch.ones(1, 2).bool(), torch.ones(1, 4))
    plan = Plan.side_by_side([text, image])
    x = torch.randn(1, 7, 3, dtype=dtype)
    expected = plan.reduce(x)
    x[:, [2, 6]] = torch.nan
    found = plan.reduce(x)
    assert torch.equal(found[plan.mask_BK], expected[plan.mask_BK])


# --- budgets ---


@given(
    ratio=st.floats(0, 1, exclude_max=True),
    counts=st.lists(st.integers(0, 600), min_size=1, max_size=20),
)
def test_budgets_are_the_same_for_numbers_and_tensors(ratio, counts):
    tensor = torch.tensor(counts)
    assert portion(ratio, tensor).tolist() == [portion(ratio, count) for count in counts]
    merge = (1 - ratio) / 2
    kept, merged = prune_then_merge(tensor, ratio, merge)
    each = [prune_then_merge(count, ratio, merge) for count in counts]
    assert list(zip(kept.tolist(), merged.tolist(), strict=True)) == each
    # A longer row never ends up shorter: the padded length bounds every row of the batch.
    left = [
        kept - merged
        for kept, merged in (prune_then_merge(count, ratio, merge) for count in sorted(counts))
    ]
    assert left == sorted(left)
    assert all(0 <= merged <= kept for kept, merged in each)


def test_rounding_is_half_to_even():
    assert [portion(0.5, count) for count in (1, 3, 5)] == [0, 2, 2]
    assert portion(0.5, torch.tensor([1, 3, 5])).tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("r", "expected"), [(3, [3] * 4), ((3, 1.0), [0, 2, 4, 6]), ((5, 2, 1), [5, 2, 1, 0])]
)
def test_merge_schedules(r, expected):
    assert merge_schedule(r, 4) == expected


# --- what the papers say, in slow loops ---


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    padding=st.integers(0, 2),
    num_prefix_tokens=st.integers(0, 2),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_bipartite_matching_is_what_the_published_code_does(
    counts, padding, num_prefix_tokens, ratio, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = len(counts), max(counts) + padding
    keys, x = (
        torch.randn(*shape, 3, generator=generator),
        torch.randn(*shape, 2, generator=generator),
    )
    sizes = torch.randint(1, 5, shape, generator=generator).float()
    valid = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    merged = [int(ratio * (count // 2)) for count in counts]
    slots = max(count - gone for count, gone in zip(counts, merged, strict=True))
    plan = bipartite(keys, valid, torch.tensor(merged), slots, sizes, num_prefix_tokens)
    reduced = plan.reduce(x)
    for row, count in enumerate(counts):
        structure = [[1.0, 0.0, 0.0]] * num_prefix_tokens
        expected, gap = slow.bipartite(
            structure + keys[row, :count].tolist(), merged[row], num_prefix_tokens
        )
        assume(gap > 1e-5)
        expected = [
            frozenset(token - num_prefix_tokens for token in group)
            for group in expected[num_prefix_tokens:]
        ]
        assert groups(plan, row) == expected
        assert int(plan.mask_BK[row].sum()) == count - merged[row]
        averages = slow.average(x[row].tolist(), sizes[row].tolist(), expected)
        torch.testing.assert_close(
            reduced[row, : len(expected)], torch.tensor(averages), atol=1e-5, rtol=1e-4
        )


@given(
    batch=batches(),
    prune=st.sampled_from([0, 0.1, 0.25, 0.5]),
    merge=st.sampled_from([0, 0.3, 0.45]),
    merge_text=st.sampled_from([0, 0.2, 0.5]),
    cross=st.booleans(),
    options=st.sampled_from(
        [{}, {}, {"protect": 0.3}, {"prune_below": 0.7}, {"prune_below": 0.9, "protect": 0.5}]
    ),
)
def test_pumer_is_what_the_paper_says(batch, prune, merge, merge_text, cross, options):
    """The options beyond the paper too."""
    reducer = PuMer(prune=prune, merge=merge, merge_text=merge_text, layers=(0,), **options)
    tokens = tokens_of(*batch)
    if cross:  # the text asks the image alone
        tokens = replace(tokens, cross=True, queries_BHNC=tokens.queries_BHNC[:, :, : tokens.text])
    plan = reducer.plan(tokens)
    for row, sample in enumerate(batch[0]):
        real = tokens.mask_BN[row]
        queries = tokens.queries_BHNC[row, :, : sample.text].tolist()
        keys = tokens.keys_BHNC[row, :, real].tolist()
        expected, gap, _ = slow.pumer(reducer, queries, keys, sample.text, cross)
        assume(gap > 1e-5)
        assert groups(plan, row, real) == expected


@given(batch=batches(), smooth=st.sampled_from([0.3, 0.9]), seed=st.integers(0, 99))
def test_smoothed_saliency_is_averaged_with_what_is_carried_on(batch, smooth, seed):
    """The first layer has nothing before it; another has the sums of what each token stands for."""
    reducer = PuMer(prune=0.3, merge=0.3, merge_text=0, layers=(0, 1), smooth=smooth)
    tokens = tokens_of(*batch)
    generator = torch.Generator().manual_seed(seed)
    earlier_BN = torch.rand(tokens.sizes_BN.shape, generator=generator) / 4
    for carried_BN in (None, earlier_BN):
        plan = reducer.plan(replace(tokens, carried_BN=carried_BN))
        for row, sample in enumerate(batch[0]):
            real = tokens.mask_BN[row]
            queries = tokens.queries_BHNC[row, :, : sample.text].tolist()
            keys = tokens.keys_BHNC[row, :, real].tolist()
            carried = None if carried_BN is None else carried_BN[row, real].tolist()
            expected, gap, saliency = slow.pumer(
                reducer, queries, keys, sample.text, carried=carried
            )
            assume(gap > 1e-5)
            assert groups(plan, row, real) == expected
            image = slice(sample.text + 1, None)
            carried_on = plan.carried_BN[row, real][image]
            torch.testing.assert_close(carried_on, torch.tensor(saliency[image]), atol=1e-5, rtol=0)


@given(batch=batches(), merge=st.sampled_from([0.3, 0.45]))
def test_weighted_merging_averages_by_size_and_saliency(batch, merge):
    reducer = PuMer(prune=0, merge=merge, merge_text=0, layers=(0,), weighted=True)
    tokens = tokens_of(*batch)
    weight_BN = reducer.plan(tokens).weight_BN
    for row, sample in enumerate(batch[0]):
        real = tokens.mask_BN[row]
        queries = tokens.queries_BHNC[row, :, : sample.text].tolist()
        keys = tokens.keys_BHNC[row, :, real].tolist()
        expected, gap, attention = slow.pumer(reducer, queries, keys, sample.text)
        assume(gap > 1e-5)
        sizes = tokens.sizes_BN[row, real].tolist()
        weight = weight_BN[row, real].tolist()
        for group in (group for group in expected if min(group) > sample.text):
            total = sum(sizes[token] * attention[token] for token in group)
            for token in group:
                assert weight[token] == pytest.approx(
                    sizes[token] * attention[token] / total, abs=1e-4
                )
