"""One reduction of the prompts: ask the reducer for a plan, and apply it to states and layout.

Shape suffixes: B samples, R rows of a view (samples, or images), S tokens of the prompt, K tokens
of the layer, N tokens of a view, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder.inside_tower import stack_plans
from pumer.adapters.decoder.prompt import ForwardState, PromptStep, TokenLayout, to_device
from pumer.adapters.decoder.view import View, image_rows, view_images, view_samples
from pumer.adapters.forward import no_autocast
from pumer.adapters.step import ReductionStep
from pumer.reducers import EMBEDDINGS, Plan, TokenShape
from pumer.reducers.tokens import Grid


def reduce(
    patch: Patch, state: ForwardState, layer: int, states_BKD: Tensor, causal: bool
) -> tuple[Tensor, Plan]:
    """Let the reducer act after a layer; `state.layout` is then that of the tokens left.

    Args:
        patch: whose reducer acts.
        state: of the call.
        layer: the one that has run, `EMBEDDINGS` before the first.
        states_BKD: after it.
        causal: whether a token of the prompt sees only those before it.

    Returns:
        The states of the tokens left, and the plan from one layout to the other.
    """
    reducer = patch.reducer
    assert state.layout is not None
    layout = state.layout.to(states_BKD.device)
    if layer == EMBEDDINGS and has_merged_images(state):
        return _gather_merged(patch, state, layout, states_BKD)
    counts_before = layout.counts
    grids: list[Grid | None] = [None] * len(layout.counts)
    if layer == EMBEDDINGS:
        rows = image_rows(state.images, state.sample_index, reducer.traits.per_crop)
        view = view_images(state, layout, rows, states_BKD, causal)
        counts_before = tuple((layout.counts[row.sample][0], len(row.patch_I)) for row in rows)
        grids = [row.grid for row in rows]
    else:
        view = view_samples(state, layout, layer, states_BKD, causal)
        if view.tokens.grid is not None:
            grids = [image.grid for image in state.images]
    # Which tokens to drop is a choice, not a function to differentiate; the gradient flows through
    # those that are kept.
    with torch.no_grad(), no_autocast(reducer, states_BKD.device):
        plan = reducer.plan(view.tokens)
    counts_after = [
        reducer.lengths(TokenShape(*count, layer, 0, grid))
        for count, grid in zip(counts_before, grids, strict=True)
    ]
    gaps = reducer.traits.dynamic_length
    if gaps and patch.trim and not torch.compiler.is_compiling():
        # How many tokens are left depends on the data: only for such reducers does the host wait.
        gaps = False
        filled = plan.mask_BK.sum(1).tolist()
        counts_after = [
            (text, total - text) for total, (text, _) in zip(filled, counts_after, strict=True)
        ]
    return _apply(patch, state, layout, view, plan, counts_after, gaps, states_BKD)


def has_merged_images(state: ForwardState) -> bool:
    """Whether patches were merged before the language model, which is to get one of each group."""
    return any(image.merged for image in state.images)


def _gather_merged(
    patch: Patch, state: ForwardState, layout: TokenLayout, states_BSD: Tensor
) -> tuple[Tensor, Plan]:
    """One token for every group that was merged before; all tokens of a group are the same."""
    rows = image_rows(state.images, state.sample_index, per_crop=False)
    view = view_images(state, layout, rows, states_BSD, causal=False)
    plans = [image.merged for image in state.images if image.merged]
    merged = stack_plans(plans).to(states_BSD.device)
    text_mask_RT = view.tokens.mask_BN[:, : view.tokens.text]
    plan = Plan.side_by_side([Plan.identity(text_mask_RT), merged])
    # Images of other sizes fill other numbers of slots, and so do all where the data decide; the
    # tower has trimmed those to the fullest image.
    ragged = any(plan.slot_BN.shape != plans[0].slot_BN.shape for plan in plans)
    num_kept = (
        merged.mask_BK.sum(1).tolist()
        if ragged or patch.reducer.traits.dynamic_length
        else [merged.slots] * len(state.images)
    )
    counts_after = [
        (layout.counts[sample][0], count)
        for sample, count in zip(state.sample_index, num_kept, strict=True)
    ]
    return _apply(patch, state, layout, view, plan, counts_after, False, states_BSD)


def _apply(
    patch: Patch,
    state: ForwardState,
    layout: TokenLayout,
    view: View,
    plan: Plan,
    counts_after: Sequence[tuple[int, int]],
    gaps: bool,
    states_BKD: Tensor,
) -> tuple[Tensor, Plan]:
    """States and layout after a plan for a view.

    Args:
        counts_after: (text, image) tokens that it leaves in every row.
        gaps: whether it may leave fewer.
    """
    tokens = view.tokens
    counts = counts_per_sample(layout, view.sample_index, counts_after)
    num_left = [
        num_untouched + text + image
        for num_untouched, (text, image) in zip(state.num_untouched, counts, strict=True)
    ]
    lifted = lift_plan(plan, view, layout, max(num_left))
    if plan.carried_BN is not None:
        layout = replace(layout, carried_BK=carried(plan, view, layout))
    state.layout = layout.after(lifted, counts, gaps or min(num_left) < max(num_left))
    if plan.index_BK is None:
        lifted = replace(lifted, index_BK=None)
    state.plan = lifted if state.plan is None else state.plan.to(states_BKD.device).then(lifted)
    if patch.steps is not None:
        images = tuple(
            (sample, image.num_patches, image.grid)
            for sample, image in zip(state.sample_index, state.images, strict=True)
        )
        image_BS = layout.image_BK if layout.unreduced else None
        step = PromptStep(state.plan.slot_BN, image_BS, images)
        patch.steps.append(
            ReductionStep(tokens.layer, tokens.text, plan, tokens.grid, tokens.patch_BN, step)
        )
    return lifted.reduce(states_BKD), lifted


def carried(plan: Plan, view: View, layout: TokenLayout) -> Tensor:
    """What a plan carries on of a view's tokens, at these tokens of the layout; 0 elsewhere."""
    assert plan.carried_BN is not None
    batch, count = layout.index_BK.shape
    values = plan.carried_BN.new_zeros(batch * count + 1)
    _, target_RN = flat_index(view, layout)
    values = values.scatter(0, target_RN.flatten(), plan.carried_BN.flatten())
    return values[:-1].view(batch, count)


def flat_index(view: View, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The sample of every row of a view, int64 [R,1], and where its tokens are in the flattened
    layout, int64 [R,N]; one past the end for those that no plan may touch."""
    batch, count = layout.index_BK.shape
    device = view.index_RN.device
    sample_R1 = torch.arange(batch, device=device)[:, None]
    if view.sample_index is not None:
        sample_R1 = to_device(view.sample_index, device)[:, None]
    flat_RN = torch.where(view.reducible_RN, sample_R1 * count + view.index_RN, batch * count)
    return sample_R1, flat_RN


def counts_per_sample(
    layout: TokenLayout,
    sample_index: Sequence[int] | None,
    counts: Sequence[tuple[int, int]],
) -> tuple[tuple[int, int], ...]:
    """(text, image) tokens of every sample, from those of the rows of a view; `sample_index` is
    None where rows are samples."""
    texts, images = [text for text, _ in layout.counts], [0] * len(layout.counts)
    rows = range(len(counts)) if sample_index is None else sample_index
    for sample, (text, image) in zip(rows, counts, strict=True):
        texts[sample] = text
        images[sample] += image
    return tuple(zip(texts, images, strict=True))


def lift_plan(plan: Plan, view: View, layout: TokenLayout, slots: int) -> Plan:
    """A plan for a view, as a plan for the layout that the view is of.

    Tokens outside the view stay. Those left keep their order, a merged one is where its first
    member was, and empty slots come first, so that the last token is the last one again.

    Args:
        plan: of the view.
        view: its tokens by their index in the layout.
        layout: of all tokens.
        slots: number of slots, at least the tokens left in any sample.
    """
    batch, count = layout.index_BK.shape
    index_RN, reducible_RN = view.index_RN, view.reducible_RN
    device = index_RN.device

    # Of every slot the first token that goes into it, and of every token of the view that one: its
    # leader. -1 for tokens that are dropped.
    slot_RN = torch.where((plan.slot_BN < 0) | ~reducible_RN, plan.slots, plan.slot_BN)
    first_RK = torch.full((len(index_RN), plan.slots + 1), count, device=device, dtype=torch.int64)
    first_RK = first_RK.scatter_reduce(1, slot_RN, index_RN, "amin")
    lead_RN = first_RK.gather(1, slot_RN).masked_fill(slot_RN == plan.slots, -1)

    # The same for the whole layout, where a token outside the view leads itself. One entry past the
    # end takes padding.
    sample_R1, target_RN = flat_index(view, layout)
    index_BK = torch.arange(count, device=device).expand(batch, count)
    itself_BK = index_BK
    if layout.filled_BK is not None:
        itself_BK = index_BK.masked_fill(~layout.filled_BK, -1)
    lead_BK = torch.cat([itself_BK.flatten(), itself_BK.new_zeros(1)]).scatter(
        0, target_RN.flatten(), lead_RN.flatten()
    )
    lead_BK = lead_BK[:-1].view(batch, count)
    weight = torch.ones(batch * count + 1, device=device).scatter(
        0, target_RN.flatten(), plan.weight_BN.flatten()
    )

    # Leaders stay and are numbered in their order, the last one in the last slot; the others go
    # where their leader goes.
    stays_BK = lead_BK == index_BK
    num_left_B1 = stays_BK.sum(1, keepdim=True)
    rank_BK = stays_BK.long().cumsum(1) - 1 + slots - num_left_B1
    slot_BK = torch.where(lead_BK < 0, -1, rank_BK.gather(1, lead_BK.clamp_min(0)))
    kept_index = torch.zeros(batch, slots + 1, device=device, dtype=torch.int64)
    kept_index = kept_index.scatter(1, torch.where(stays_BK, rank_BK, slots), index_BK)[:, :slots]
    mask = torch.arange(slots, device=device) >= slots - num_left_B1
    lifted = Plan(slot_BK, weight[:-1].view(batch, count), mask, kept_index)
    if plan.shares_BKN is None:
        return lifted

    # Shares of tokens in several slots: rows of the view's slots, where these are now. One row and
    # one column too many take those of empty slots and of padding.
    rank_RS = nn.functional.pad(rank_BK, (0, 1), value=slots)[sample_R1[:, 0]]
    row_RK = sample_R1 * (slots + 1) + rank_RS.gather(1, first_RK[:, :-1])
    column_RN = torch.where(reducible_RN, index_RN, count)
    shares = nn.functional.pad(lifted.matrix(), (0, 1, 0, 1)).flatten()
    target_RKN = row_RK[:, :, None] * (count + 1) + column_RN[:, None]
    shares = shares.scatter(0, target_RKN.flatten(), plan.shares_BKN.float().flatten())
    shares_BKN = shares.view(batch, slots + 1, count + 1)[:, :-1, :-1]
    return replace(lifted, shares_BKN=shares_BKN)
