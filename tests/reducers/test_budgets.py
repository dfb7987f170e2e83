"""Budgets that the data decide, their calibration, and reducers one after another."""

from dataclasses import replace

import numpy as np
import pytest
import slow_selectors as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import GRIDS, batch, kept, picture, shares

from pumer.reducers import (
    EMBEDDINGS,
    Chain,
    Compose,
    DivPrune,
    DyMU,
    DyMUCalibrator,
    Energy,
    EnergyCalibrator,
    FasterVLM,
    PruMerge,
    PyramidDrop,
    SVDPrune,
    TokenShape,
    ToMe,
    VisionZip,
    VisPruner,
    from_dict,
    to_dict,
)
from pumer.reducers.ops import budget as budgets

COUNTS = [rows * columns for rows, columns in GRIDS]


@given(
    keep=st.one_of(st.integers(1, 700), st.floats(0, 1, exclude_min=True)),
    counts=st.lists(st.integers(0, 600), min_size=1, max_size=20),
)
def test_a_budget_is_the_same_for_numbers_and_tensors(keep, counts):
    counts.sort()
    numbers = [budgets.num_keep(keep, count) for count in counts]
    assert budgets.num_keep(keep, torch.tensor(counts)).tolist() == numbers
    # A longer picture never keeps less: the padded length bounds every row of the batch.
    assert numbers == sorted(numbers)
    assert all(
        min(count, 1) <= number <= count for number, count in zip(numbers, counts, strict=True)
    )


# --- E-AdaPrune ---


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(
    "selector", [DivPrune(), VisPruner(), SVDPrune(features="states")], ids=lambda s: s.name
)
def test_the_spectrum_decides_how_many_stay(tau, selector):
    reducer = Energy(selector, tau=tau, least=2, most=0.7)
    for seed in range(3):
        tokens = batch(seed)
        plan = reducer.plan(tokens)
        assert plan.slots == tokens.text + round(0.7 * (tokens.mask_BN.shape[1] - tokens.text))
        for row, count in enumerate(COUNTS):
            wanted = slow.energy_count(picture(tokens, row).states, tau)
            number = min(max(wanted, min(2, count)), round(0.7 * count))
            # Which ones is up to the selector, given that number.
            fixed = replace(selector, keep=number).plan(tokens)
            assert kept(plan, tokens, row) == kept(fixed, tokens, row)


def test_what_is_removed_does_not_depend_on_the_upper_bound():
    """VisPruner thins out its list even where no row is certain to keep fewer than all."""
    tokens = batch(0, grids=((5, 6),), words=(2,), padding=0, width=10)
    bounded, free = (Energy(VisPruner(), tau=0.5, least=8, most=most) for most in (20, 1.0))
    assert kept(free.plan(tokens), tokens, 0) == kept(bounded.plan(tokens), tokens, 0)


@pytest.mark.parametrize(("tokens", "width"), [(20, 8), (8, 20)])
def test_energies_are_squared_singular_values(tokens, width):
    probe = EnergyCalibrator()
    seen = batch(0, grids=((tokens // 4, 4),), words=(1,), padding=0, width=width)
    plan = probe.plan(seen)
    assert plan.slot_BN.tolist() == [list(range(1 + tokens))]
    ((energy, count),) = probe.noted
    assert count.tolist() == [tokens]
    expected = np.linalg.svd(picture(seen, 0, ((tokens // 4, 4),)).states, compute_uv=False) ** 2
    np.testing.assert_allclose(energy[0].numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("keep", [0.2, 0.4, 6])
def test_tau_is_matched_to_a_fixed_budget(keep):
    probe = EnergyCalibrator()
    batches = [batch(seed) for seed in range(8)]
    for tokens in batches:
        probe.plan(tokens)
    reducer = Energy(DivPrune(), least=1, most=1.0).matched(probe.noted, keep)
    numbers = [reducer.plan(tokens).mask_BK[:, tokens.text :].sum(1) for tokens in batches]
    fixed = np.mean([budgets.num_keep(keep, count) for count in COUNTS])
    assert float(torch.cat(numbers).double().mean()) == pytest.approx(fixed, abs=0.3)


def test_a_budget_out_of_bounds_cannot_be_matched():
    probe = EnergyCalibrator()
    probe.plan(batch(0))
    with pytest.raises(ValueError, match="widen least and most"):
        Energy(most=0.3).matched(probe.noted, 0.8)
    with pytest.raises(ValueError, match="give the spectra"):
        Energy().matched([], 0.8)


# --- DyMU ---


def test_cutoffs_merge_a_number_per_picture_on_average():
    calibration = DyMUCalibrator(r=2, depth=1)
    for seed in range(3):
        tokens = batch(seed, layer=0)
        plan = calibration.plan(tokens)
        merged = sum(COUNTS) - int(plan.mask_BK[:, tokens.text :].sum())
        assert merged == 2 * len(COUNTS)
        # The threshold that was noted is one that DyMU does the same with.
        again = DyMU(thresholds=(float(calibration.noted[0][-1]),)).plan(tokens)
        assert torch.equal(again.slot_BN, plan.slot_BN)
    mean = sum(float(cut) for cut in calibration.noted[0]) / 3
    assert calibration.thresholds() == pytest.approx((mean,))
    assert DyMU(thresholds=calibration.thresholds()).layers == (0,)


def test_cutoffs_before_any_picture():
    with pytest.raises(ValueError, match="run images through the model"):
        DyMUCalibrator(depth=2).thresholds()


def test_more_pairs_than_there_are():
    tokens = batch(0, layer=0, grids=((2, 2),), words=(1,))
    plan = DyMUCalibrator(r=100, depth=1).plan(tokens)
    assert int(plan.mask_BK[:, tokens.text :].sum()) == 2


# --- one after another ---


def test_a_chain_acts_where_its_members_do():
    first, second = VisionZip(keep=0.5), PyramidDrop(keep=(0.5, 0.25), layers=(1, 3))
    chain = Chain((first, second))
    assert chain.layers == (EMBEDDINGS, 1, 3)
    assert chain.traits.needs_encoder == first.traits.needs_encoder
    assert not chain.traits.dynamic_length
    assert Chain((PruMerge(), second)).traits.dynamic_length
    for layer, member in ((EMBEDDINGS, first), (1, second), (3, second)):
        tokens = batch(0, layer=layer)
        plan = chain.plan(tokens)
        assert torch.equal(plan.slot_BN, member.plan(tokens).slot_BN)
        assert chain.lengths(TokenShape(9, 32, layer, 0)) == member.lengths(
            TokenShape(9, 32, layer, 0)
        )
    assert chain.lengths(TokenShape(9, 32, 2, 0)) == (9, 32)
    chain.check(4)
    with pytest.raises(ValueError, match=r"pyramiddrop reduces in layers \[3\]"):
        chain.check(3)


def test_a_chain_around_a_tower():
    """Three places at once: inside the tower, before the language model, inside it."""
    reducer = Compose(
        ToMe(r=2, depth=3), Chain((FasterVLM(keep=8), PyramidDrop(keep=(0.5,), layers=(1,))))
    )
    assert reducer.traits.needs_encoder == {"class_attention_BN"}
    assert from_dict(to_dict(reducer)) == reducer
    with pytest.raises(ValueError, match="around a chain"):
        Chain((reducer, DivPrune()))


def test_what_is_chained_sees_what_is_left():
    tokens = batch(1)
    first = FasterVLM(keep=0.5).plan(tokens)
    left = replace(
        tokens,
        layer=1,
        mask_BN=first.mask_BK,
        sizes_BN=first.total(tokens.sizes_BN),
        states_BND=first.reduce(tokens.states_BND),
        queries_BHNC=torch.randn(len(GRIDS), 2, first.slots, 4),
        keys_BHNC=torch.randn(len(GRIDS), 2, first.slots, 4),
    )
    second = Chain((FasterVLM(keep=0.5), PyramidDrop(keep=(0.5,), layers=(1,)))).plan(left)
    both = first.then(second)
    for row, count in enumerate(COUNTS):
        # PyramidDrop rounds down, as published.
        assert len(shares(both, tokens, row)) == max(1, budgets.num_keep(0.5, count) // 2)
