"""Reducers that a language model's attention guides, at the edges: no text, no image, no
numbers."""

import math
from dataclasses import replace

import pytest
import torch
from pictures import GRIDS, alone, batch, shares
from test_language import LAYER, REDUCERS, causal, every
from test_selectors import same

from pumer.reducers import PuMer, TokenShape
from pumer.reducers.ops.clustering import density_peaks
from pumer.reducers.ops.saliency import last_text_attention, text_saliency

MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0, layers=(LAYER,))
every_and_merging = pytest.mark.parametrize(
    "reducer", [*REDUCERS.values(), MERGING], ids=[*REDUCERS, "pumer-merging"]
)


def check(plan, reducer, tokens):
    """Slots are in range, and as many are filled as `lengths` promises."""
    text, image = tokens.text, tokens.mask_BN.shape[1] - tokens.text
    assert plan.slots == sum(
        reducer.lengths(TokenShape(text, image, LAYER, tokens.num_prefix_tokens))
    )
    assert (plan.slot_BN < plan.slots).all()
    real = plan.sources() & tokens.mask_BN[:, None]
    assert torch.equal(real.any(2), plan.mask_BK)
    for row, mask in enumerate(tokens.mask_BN):
        counts = int(mask[:text].sum()), int(mask[text:].sum())
        promised = sum(reducer.lengths(TokenShape(*counts, LAYER, tokens.num_prefix_tokens)))
        assert int(plan.mask_BK[row].sum()) == promised
        assert reducer.lengths(TokenShape(*counts, LAYER, tokens.num_prefix_tokens))[1] >= min(
            counts[1], 1
        )


@every
@causal
@pytest.mark.parametrize("words", [(0, 0, 0, 0), (3, 0, 2, 0)])
def test_a_row_without_text_is_as_alone(reducer, causal, words):
    for seed in range(4):
        tokens = batch(seed, words=words, layer=LAYER, causal=causal)
        plan = reducer.plan(tokens)
        check(plan, reducer, tokens)
        for row in range(len(GRIDS)):
            one = alone(tokens, row)
            assert one.text == words[row]
            same(shares(plan, tokens, row), shares(reducer.plan(one), one, 0))


@every_and_merging
@causal
def test_a_row_without_image_has_nothing_to_reduce(reducer, causal):
    tokens = batch(0, layer=LAYER, causal=causal)
    empty = replace(tokens, mask_BN=tokens.mask_BN.clone())
    empty.mask_BN[1, tokens.text :] = False
    check(reducer.plan(empty), reducer, empty)
    text = tokens.text
    nothing = replace(
        tokens,
        mask_BN=tokens.mask_BN[:, :text],
        sizes_BN=tokens.sizes_BN[:, :text],
        states_BND=tokens.states_BND[:, :text],
        queries_BHNC=tokens.queries_BHNC[:, :, :text],
        keys_BHNC=tokens.keys_BHNC[:, :, :text],
        place_BN=None if tokens.place_BN is None else tokens.place_BN[:, :text],
        embeddings=None,
    )
    for tokens in (nothing, replace(nothing, num_prefix_tokens=1)):
        plan = reducer.plan(tokens)
        assert plan.slots == text
        assert reducer.lengths(TokenShape(text, 0, LAYER, tokens.num_prefix_tokens)) == (text, 0)
        assert torch.equal(plan.mask_BK, tokens.mask_BN)


def test_in_co_attention_a_row_without_text_is_as_alone():
    tokens = batch(0, words=(3, 0, 2, 4), layer=LAYER)
    queries = tokens.queries_BHNC[:, :, : tokens.text].masked_fill(
        ~tokens.mask_BN[:, None, : tokens.text, None], math.nan
    )
    for function in (last_text_attention, text_saliency):
        together = function(replace(tokens, cross=True, queries_BHNC=queries))
        for row in range(len(GRIDS)):
            one = alone(tokens, row)
            queries_of_text = one.queries_BHNC[:, :, : one.text]
            expected = function(replace(one, cross=True, queries_BHNC=queries_of_text))[0]
            torch.testing.assert_close(together[row, : len(expected)], expected)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
@pytest.mark.parametrize("prune", [0.0, 0.05, 0.3, 0.5, 0.6, 0.9, 0.999])
def test_pumer_leaves_an_image_token_at_every_ratio(num_prefix_tokens, prune):
    for merge in (0.0, 0.0009, 0.05, 0.3, 0.39, 0.9):
        if prune + merge >= 1:
            continue
        reducer = PuMer(prune=prune, merge=merge, merge_text=0.3, layers=(LAYER,))
        for grids in (((1, 1), (1, 2), (1, 3), (3, 3)), ((1, 1),) * 4):
            tokens = replace(
                batch(0, grids=grids, layer=LAYER), num_prefix_tokens=num_prefix_tokens
            )
            check(reducer.plan(tokens), reducer, tokens)
            counts = torch.arange(1, 60)
            lengths = [
                reducer.lengths(TokenShape(0, num_prefix_tokens + count, LAYER, num_prefix_tokens))[
                    1
                ]
                for count in counts.tolist()
            ]
            assert lengths[0] == num_prefix_tokens + 1
            assert lengths == sorted(lengths)


@every
@causal
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e38])
def test_what_is_no_number_stays_in_its_row(reducer, causal, value):
    for seed in range(4):
        tokens = batch(seed, layer=LAYER, causal=causal)
        generator = torch.Generator().manual_seed(seed)
        ill = replace(
            tokens,
            states_BND=tokens.states_BND.clone(),
            queries_BHNC=tokens.queries_BHNC.clone(),
            keys_BHNC=tokens.keys_BHNC.clone(),
        )
        hit = torch.rand(tokens.mask_BN.shape[1], generator=generator) < (0.2, 1.0)[seed % 2]
        ill.states_BND[0, hit, seed] *= value
        ill.queries_BHNC[0, :, hit] *= value
        ill.keys_BHNC[0, :, hit, 0] *= value
        plan, expected = reducer.plan(ill), reducer.plan(tokens)
        check(plan, reducer, ill)
        assert torch.equal((plan.slot_BN >= 0).sum(1), (expected.slot_BN >= 0).sum(1))
        assert torch.equal(plan.slot_BN[1:], expected.slot_BN[1:])
        assert torch.equal(plan.weight_BN[1:], expected.weight_BN[1:])
        if math.isfinite(value):
            assert plan.weight_BN.isfinite().all()


def test_tokens_too_far_apart_for_a_number_have_a_centre():
    x = torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(0))
    x[:2, 5:8] *= 1e30
    x[2] *= 1e30
    counts = torch.tensor([1, 2, 4])
    centre, nearest = density_peaks(x, torch.ones(3, 20, dtype=torch.bool), counts)
    assert torch.equal(centre.sum(1), counts)
    assert centre.gather(1, nearest).all()


@every
@causal
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_padding_may_hold_anything(reducer, causal, value):
    tokens = batch(0, layer=LAYER, causal=causal)
    padding = ~tokens.mask_BN
    padded = replace(
        tokens,
        states_BND=tokens.states_BND.masked_fill(padding[..., None], value),
        queries_BHNC=tokens.queries_BHNC.masked_fill(padding[:, None, :, None], value),
        keys_BHNC=tokens.keys_BHNC.masked_fill(padding[:, None, :, None], value),
    )
    plan, expected = reducer.plan(padded), reducer.plan(tokens)
    assert torch.equal(
        plan.slot_BN.masked_fill(padding, -1), expected.slot_BN.masked_fill(padding, -1)
    )
    assert torch.equal(plan.mask_BK, expected.mask_BK)


@every
def test_half_precision_and_ties_keep_the_count(reducer):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tokens = batch(0, layer=LAYER, causal=True)
        same_everywhere = replace(
            tokens,
            states_BND=torch.ones_like(tokens.states_BND, dtype=dtype),
            queries_BHNC=torch.ones_like(tokens.queries_BHNC, dtype=dtype),
            keys_BHNC=torch.ones_like(tokens.keys_BHNC, dtype=dtype),
        )
        check(reducer.plan(same_everywhere), reducer, same_everywhere)
