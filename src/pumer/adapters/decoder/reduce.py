"""One reduction of a prompt: what the reducer sees, what it plans, and the axis after it.

Shape suffixes: B samples, R rows of a view (samples, or images), S tokens of the prompt, K tokens
of the layer, N tokens of a view, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, ReductionStep
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder import vision as before_llm
from pumer.adapters.decoder.prompt import (
    Attended,
    Axis,
    ForwardState,
    PromptStep,
    View,
    place,
    to_device,
)
from pumer.adapters.forward import no_autocast
from pumer.reducers import EMBEDDINGS, Plan, Tokens, TokenShape
from pumer.reducers.plan import tokens_at
from pumer.reducers.tokens import Context, Embeddings, Grid


def reduce(
    patch: Patch, run: ForwardState, layer: int, states_BKD: Tensor, causal: bool
) -> tuple[Tensor, Plan | None]:
    """States after the reducer acted after this layer, whose axis the call's state then has, and
    the plan from one axis to the other; None where nothing was reduced.

    Args:
        patch: whose reducer acts.
        run: the state of the call.
        layer: the one that has run, `EMBEDDINGS` before the first.
        states_BKD: after it.
        causal: whether a token of the prompt sees only those before it.
    """
    reducer = patch.reducer
    assert run.axis is not None
    if layer == EMBEDDINGS and any(picture.merged for picture in run.pictures):
        return _gather(patch, run, run.axis.to(states_BKD.device), states_BKD)
    if not reducer.reduces_at(layer):
        return states_BKD, None
    axis = run.axis.to(states_BKD.device)
    before = axis.counts
    grids: list[Grid | None] = [None] * len(axis.counts)
    if layer == EMBEDDINGS:
        rows = before_llm.rows(run.pictures, run.owners, reducer.traits.per_crop)
        view = before_llm.view(axis, rows, states_BKD, causal)
        before = tuple((axis.counts[row.sample][0], len(row.at_I)) for row in rows)
        grids = [row.grid for row in rows]
    else:
        view = _view(run, axis, layer, states_BKD, causal)
        if view.tokens.grid is not None:
            grids = [picture.grid for picture in run.pictures]
    # Which tokens go is a choice, not a function to differentiate; the gradient flows through what
    # is kept.
    with torch.no_grad(), no_autocast(reducer, states_BKD.device):
        plan = reducer.plan(view.tokens)
    after = [
        reducer.lengths(TokenShape(*count, layer, 0, grid))
        for count, grid in zip(before, grids, strict=True)
    ]
    unsure = reducer.traits.dynamic_length
    if unsure and patch.trim and not torch.compiler.is_compiling():
        # The data have decided: the one kind of reducer for which the host waits.
        unsure = False
        filled = plan.mask_BK.sum(1).tolist()
        after = [(text, full - text) for full, (text, _) in zip(filled, after, strict=True)]
    return _take(patch, run, axis, view, plan, after, unsure, states_BKD)


def _gather(
    patch: Patch, run: ForwardState, axis: Axis, states_BSD: Tensor
) -> tuple[Tensor, Plan | None]:
    """States with one token for every group that was merged before; all of a group have the
    same."""
    view = before_llm.view(
        axis, before_llm.rows(run.pictures, run.owners, False), states_BSD, causal=False
    )
    merged = Plan.stack([picture.merged for picture in run.pictures if picture.merged]).to(
        states_BSD.device
    )
    plan = Plan.side_by_side([Plan.identity(view.tokens.mask_BN[:, : view.tokens.text]), merged])
    # The tower has cut its slots to those that the data fill; how many each picture fills is still
    # to be asked.
    num_kept = (
        merged.mask_BK.sum(1).tolist()
        if patch.reducer.traits.dynamic_length
        else [merged.slots] * len(run.pictures)
    )
    after = [(axis.counts[row][0], count) for row, count in zip(run.owners, num_kept, strict=True)]
    return _take(patch, run, axis, view, plan, after, False, states_BSD)


def _take(
    patch: Patch,
    run: ForwardState,
    axis: Axis,
    view: View,
    plan: Plan,
    after: Sequence[tuple[int, int]],
    unsure: bool,
    states_BKD: Tensor,
) -> tuple[Tensor, Plan | None]:
    """States after a plan for a view of the axis.

    Args:
        after: (text, image) tokens that it leaves in every row.
        unsure: whether it may leave fewer.
    """
    tokens = view.tokens
    counts = before_llm.by_sample(axis, view.owner, after)
    row_R = None if tokens.layer != EMBEDDINGS else to_device(view.owner, states_BKD.device)
    lengths_after = [
        num_untouched + text + image
        for num_untouched, (text, image) in zip(run.rest, counts, strict=True)
    ]
    placed = place(plan, axis, row_R, view.at_RN, view.own_RN, max(lengths_after))
    run.axis = axis.then(placed, counts, unsure or min(lengths_after) < max(lengths_after))
    if plan.index_BK is None:
        placed = replace(placed, index_BK=None)
    run.plan = placed if run.plan is None else run.plan.to(states_BKD.device).then(placed)
    if patch.steps is not None:
        images = tuple(
            (row, image.patches, image.grid)
            for row, image in zip(run.owners, run.pictures, strict=True)
        )
        step = PromptStep(run.plan.slot_BN, axis.image_BK if axis.whole else None, images)
        patch.steps.append(
            ReductionStep(tokens.layer, tokens.text, plan, tokens.grid, tokens.patch_BN, step)
        )
    return placed.reduce(states_BKD), placed


def _view(run: ForwardState, axis: Axis, layer: int, states_BKD: Tensor, causal: bool) -> View:
    """What a reducer sees after a layer, one row per sample."""
    at_BN, valid_BN = axis.view()
    attended = run.seen.pop(layer)
    queries_BHKC, keys_BhKC = (
        attended.queries_BHKC,
        attended.keys_BhLC[:, :, -axis.index_BK.shape[1] :],
    )
    text, _ = axis.lengths
    grid, patch_BN = None, None
    if axis.whole and run.owners == list(range(len(at_BN))):  # one picture each
        grid, patch_BI = before_llm.raster([picture.grid for picture in run.pictures], at_BN.device)
        patch_BN = None if patch_BI is None else nn.functional.pad(patch_BI, (text, 0), value=-1)
    groups = queries_BHKC.shape[1] // keys_BhKC.shape[1]
    normalizer_BHK = attended.normalizer_BHK
    tokens = Tokens(
        mask_BN=valid_BN,
        text=text,
        sizes_BN=axis.sizes_BK.gather(1, at_BN),
        layer=layer,
        num_prefix_tokens=0,
        grid=grid,
        patch_BN=patch_BN,
        states_BND=tokens_at(states_BKD, at_BN),
        queries_BHNC=_of_heads(queries_BHKC, at_BN),
        keys_BHNC=_of_heads(keys_BhKC, at_BN, groups),
        place_BN=(axis.index_BK + run.past).gather(1, at_BN) if causal else None,
        normalizer_BHN=None
        if normalizer_BHK is None
        else _of_heads(normalizer_BHK[..., None], at_BN)[..., 0],
        context=_context(run, axis, attended, groups, causal),
        question_BT=axis.question_BK.gather(1, at_BN[:, :text]) & valid_BN[:, :text],
        embeddings=_embeddings(run, axis, at_BN[:, :text]),
    )
    return View(tokens, at_BN, valid_BN, range(len(at_BN)))


def _embeddings(run: ForwardState, axis: Axis, at_BT: Tensor) -> Embeddings | None:
    """What entered the first layer at the text of a view and at all image tokens; None if not
    kept."""
    if run.embeddings_BSD is None:
        return None
    device = axis.index_BK.device
    embeddings_BSD, entered = run.embeddings_BSD.to(device), run.axes[0].to(device)
    at_BN, valid_BN = entered.view()
    text, _ = entered.lengths
    return Embeddings(
        text_BTD=tokens_at(embeddings_BSD, axis.index_BK.gather(1, at_BT)),
        image_BID=tokens_at(embeddings_BSD, entered.index_BK.gather(1, at_BN[:, text:])),
        valid_BI=valid_BN[:, text:],
    )


def _context(
    run: ForwardState, axis: Axis, attended: Attended, groups: int, causal: bool
) -> Context | None:
    """What the text attends to besides the tokens of a view; None if there is nothing.

    Args:
        run: the state of the call.
        axis: of the layer.
        attended: what its attention was asked.
        groups: heads of queries to one of keys.
        causal: whether a token of the prompt sees only those before it.
    """
    count = axis.index_BK.shape[1]
    cached = attended.keys_BhLC.shape[2] - count
    if not cached and not max(run.hidden) and attended.window is None and attended.softcap is None:
        return None
    # Tokens of this call that the view leaves out, as many slots as any sample has of them.
    hidden = Plan.keep(axis.hidden_BK, max(run.hidden))
    assert hidden.index_BK is not None
    keys_BHMC = _of_heads(attended.keys_BhLC[:, :, cached:], hidden.index_BK, groups)
    places_BM, valid_BM = hidden.reduce(axis.index_BK + run.past), hidden.mask_BK
    if cached:
        # Before them those of the cache: the last ones where a window has passed.
        own_B0 = axis.index_BK[:, :0]
        cached_BM, filled_BM = kv_cache.before(attended.held, run.past, cached, own_B0, None)
        valid_cached_BM = (
            torch.ones_like(cached_BM, dtype=torch.bool) if filled_BM is None else filled_BM
        )
        if run.mask_BL is not None:
            valid_cached_BM = valid_cached_BM & run.mask_BL.to(cached_BM.device).gather(
                1, cached_BM
            )
        keys = attended.keys_BhLC[:, :, :cached]
        keys_BHMC = torch.cat(
            [keys if groups == 1 else keys.repeat_interleave(groups, 1), keys_BHMC], 2
        )
        places_BM = torch.cat([cached_BM, places_BM], 1)
        valid_BM = torch.cat([valid_cached_BM, valid_BM], 1)
    return Context(
        keys_BHMC, valid_BM, places_BM if causal else None, attended.window, attended.softcap
    )


def _of_heads(x_BHKC: Tensor, at_BN: Tensor, repeats: int = 1) -> Tensor:
    """The tokens with these numbers in every head, each head `repeats` times; copied once."""
    batch, heads, count, width = x_BHKC.shape
    # Rows of x as [B*H*K,C]: those of a head begin at a multiple of its length.
    head_H = torch.arange(heads * repeats, device=at_BN.device) // repeats
    sample_B1 = heads * torch.arange(batch, device=at_BN.device)[:, None]
    row_BHN = count * (sample_B1 + head_H)[..., None] + at_BN[:, None]
    return x_BHKC.reshape(-1, width).index_select(0, row_BHN.flatten()).view(*row_BHN.shape, width)
