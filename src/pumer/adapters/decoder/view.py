"""What a reducer sees of a prompt: every sample in a row of its own, or every image.

Before the language model a row is an image (or a crop that has a budget of its own) with the text
of its sample; inside it a row is a sample, and the attention of the layer that has run comes along.

Shape suffixes: B samples, R rows of a view, S tokens of the prompt, K tokens of the layer, L keys
of the layer, N tokens of a view, T text tokens, I image tokens, M further keys, D channels, H heads
of queries, h heads of keys, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prompt import (
    ForwardState,
    ImageSpan,
    TokenLayout,
    join_encoders,
    to_device,
)
from pumer.reducers import EMBEDDINGS, Plan, Tokens
from pumer.reducers.plan import tokens_at
from pumer.reducers.tokens import Context, Embeddings, Encoder, Grid


@dataclass(frozen=True)
class View:
    """What a reducer sees of a token layout.

    Args:
        tokens: text first, then the image.
        index_RN: where they are in the layout.
        reducible_RN: bool, the tokens that a plan for the view may touch.
        sample_index: sample of every row; None where rows are samples.
    """

    tokens: Tokens
    index_RN: Tensor
    reducible_RN: Tensor
    sample_index: Sequence[int] | None = None


@dataclass(frozen=True)
class Row:
    """What a reducer chooses from at one time: an image, or a crop that has a budget of its own.

    Args:
        sample: index of the sample that it belongs to.
        patch_I: its patches among all those of the sample, int64 on the host.
        grid: as for `ImageSpan`.
        encoder: as for `ImageSpan`.
    """

    sample: int
    patch_I: Tensor
    grid: Grid | None
    encoder: Encoder | None


@dataclass(frozen=True)
class LayerAttention:
    """Queries, keys and rules of the attention of one layer.

    Args:
        queries_BHKC: of the layer's tokens; products with keys over sqrt(C) are the logits.
        keys_BhLC: of the tokens that its cache holds, and behind them of its own.
        window: a token sees only positions later than its own less this number; None for all.
        softcap: bound of the logits; None for none.
        cached: what the cache held before this call; None if every token.
        normalizer_BHK: log-sum-exp of the logits of every query; None where the kernel does not
            give it.
    """

    queries_BHKC: Tensor
    keys_BhLC: Tensor
    window: int | None = None
    softcap: float | None = None
    cached: kv_cache.CacheLayout | None = None
    normalizer_BHK: Tensor | None = None


def image_rows(
    images: Sequence[ImageSpan], sample_index: Sequence[int], per_crop: bool
) -> list[Row]:
    """A row for every image of the prompts, or for every crop."""
    num_patches: dict[int, int] = {}
    result = []
    for image, sample in zip(images, sample_index, strict=True):
        first = num_patches.get(sample, 0)
        num_patches[sample] = first + image.num_patches
        if not per_crop or image.crop_I is None:
            patch_I = torch.arange(first, num_patches[sample])
            result.append(Row(sample, patch_I, image.grid, image.encoder))
            continue
        for crop in image.crop_I.unique().tolist():
            patch_I = (image.crop_I == crop).nonzero()[:, 0]
            encoder = None if image.encoder is None else image.encoder.at(patch_I)
            grid = image.crop_grids[crop] if image.crop_grids else None
            result.append(Row(sample, first + patch_I, grid, encoder))
    return result


def view_images(
    state: ForwardState,
    layout: TokenLayout,
    rows: Sequence[Row],
    states_BSD: Tensor,
    causal: bool,
) -> View:
    """What a reducer sees before the first layer: every row with the text of its sample.

    Args:
        state: of the call.
        layout: its tokens.
        rows: of its images, in order.
        states_BSD: embeddings.
        causal: whether a token of the prompt sees only those before it.
    """
    device, (text, _) = states_BSD.device, layout.lengths
    sample_index = [row.sample for row in rows]
    index_BN, valid_BN = layout.text_then_image()
    sample_R = to_device(sample_index, device)
    # Of the image tokens of its sample, those of the row; -1 behind the last one.
    patch_RI = to_device(
        pad_sequence([row.patch_I for row in rows], True, padding_value=-1), device
    )
    index_RT = index_BN[sample_R, :text]
    index_RI = index_BN[sample_R, text:].gather(1, patch_RI.clamp_min(0))
    index_RN = torch.cat([index_RT, index_RI], 1)
    valid_RN = torch.cat([valid_BN[sample_R, :text], patch_RI >= 0], 1)
    tokens = _tokens(
        state,
        layout,
        EMBEDDINGS,
        states_BSD,
        causal,
        sample_R,
        index_RN,
        valid_RN,
        [row.grid for row in rows],
    )
    tokens = replace(tokens, encoder=_row_encoders(rows, device))
    # A text is that of several rows, so that no plan for one of them may touch it.
    is_image_N = torch.arange(index_RN.shape[1], device=device) >= text
    return View(tokens, index_RN, valid_RN & is_image_N, sample_index)


def view_samples(
    state: ForwardState, layout: TokenLayout, layer: int, states_BKD: Tensor, causal: bool
) -> View:
    """What a reducer sees after a layer: every sample, and the attention of that layer where it
    reads it.

    Args:
        state: of the call.
        layer: the one that has run.
        states_BKD: after it.
        causal: whether a token of the prompt sees only those before it.
    """
    index_BN, valid_BN = layout.text_then_image()
    num_samples, text = len(index_BN), layout.lengths[0]
    one_image_each = state.sample_index == list(range(num_samples))
    # After a reduction the patches are no longer those of a grid.
    grids = (
        [image.grid for image in state.tower_images]
        if layout.unreduced and one_image_each
        else None
    )
    tokens = _tokens(state, layout, layer, states_BKD, causal, None, index_BN, valid_BN, grids)

    if state.layer_input_BKD is not None:
        input_BKD, state.layer_input_BKD = state.layer_input_BKD, None
        input_BND = tokens_at(input_BKD.to(index_BN.device), index_BN)
        tokens = replace(tokens, input_BND=input_BND)
    attention = state.attention.pop(layer, None)
    if attention is None:  # the reducer reads neither queries nor keys
        embeddings = _embeddings(state, layout, index_BN[:, :text])
        return View(replace(tokens, embeddings=embeddings), index_BN, valid_BN)
    queries_BHKC = attention.queries_BHKC
    keys_BhKC = attention.keys_BhLC[:, :, -layout.index_BK.shape[1] :]  # without the cached ones
    repeats = queries_BHKC.shape[1] // keys_BhKC.shape[1]
    normalizer_BHN = None
    if attention.normalizer_BHK is not None:
        normalizer_BHN = _of_heads(attention.normalizer_BHK[..., None], index_BN)[..., 0]
    tokens = replace(
        tokens,
        queries_BHNC=_of_heads(queries_BHKC, index_BN),
        keys_BHNC=_of_heads(keys_BhKC, index_BN, repeats),
        normalizer_BHN=normalizer_BHN,
        context=_context(state, layout, attention, repeats, causal),
        embeddings=_embeddings(state, layout, index_BN[:, :text]),
    )
    return View(tokens, index_BN, valid_BN)


def _tokens(
    state: ForwardState,
    layout: TokenLayout,
    layer: int,
    states_BKD: Tensor,
    causal: bool,
    sample_R: Tensor | None,
    index_RN: Tensor,
    valid_RN: Tensor,
    grids: Sequence[Grid | None] | None,
) -> Tokens:
    """What both views have: tokens by their index in the layout, text first."""
    text, _ = layout.lengths
    num_samples, num_tokens = layout.index_BK.shape
    # Index of the tokens where samples lie one behind the other, as in x.flatten(0, 1).
    row_R = torch.arange(num_samples, device=index_RN.device) if sample_R is None else sample_R
    flat_RN = row_R[:, None] * num_tokens + index_RN

    def of_tokens(x_BK: Tensor) -> Tensor:
        # One selection of whole rows, which is faster than `gather` on a CPU.
        selected = x_BK.flatten(0, 1).index_select(0, flat_RN.flatten())
        return selected.view(*flat_RN.shape, *x_BK.shape[2:])

    grid, patch_RI = (None, None) if grids is None else common_grid(grids, index_RN.device)
    return Tokens(
        mask_BN=valid_RN,
        text=text,
        sizes_BN=of_tokens(layout.sizes_BK),
        carried_BN=None if layout.carried_BK is None else of_tokens(layout.carried_BK),
        layer=layer,
        num_prefix_tokens=0,
        grid=grid,
        patch_BN=None if patch_RI is None else nn.functional.pad(patch_RI, (text, 0), value=-1),
        states_BND=of_tokens(states_BKD),
        place_BN=of_tokens(layout.index_BK + state.past) if causal else None,
        question_BT=of_tokens(layout.question_BK)[:, :text] & valid_RN[:, :text],
    )


def _row_encoders(rows: Sequence[Row], device: torch.device) -> Encoder | None:
    """What the vision tower says of all rows, on the language model's device."""

    def padded(values: list[Tensor]) -> Tensor:
        wide = (
            values[0]
            if len(values) == 1
            else pad_sequence([value[0] for value in values], batch_first=True)
        )
        return wide.to(device)

    return join_encoders([row.encoder for row in rows], padded)


def common_grid(
    grids: Sequence[Grid | None], device: torch.device
) -> tuple[Grid | None, Tensor | None]:
    """The smallest grid that all these fit into, and every patch's index in it [R,I]; None if one
    is missing."""
    if any(grid is None for grid in grids):
        return None, None
    rows, columns = (max(sides) for sides in zip(*filter(None, grids), strict=True))
    indices = [
        torch.arange(rows * columns).view(rows, columns)[:r, :c].flatten()
        for r, c in filter(None, grids)
    ]
    return (rows, columns), to_device(
        pad_sequence(indices, batch_first=True, padding_value=-1), device
    )


def _embeddings(state: ForwardState, layout: TokenLayout, index_BT: Tensor) -> Embeddings | None:
    """What entered the first layer at the text of a view and at all image tokens; None if not
    kept."""
    if state.embeddings_BSD is None:
        return None
    device = layout.index_BK.device
    embeddings_BSD, entered = state.embeddings_BSD.to(device), state.layouts[0].to(device)
    index_BN, valid_BN = entered.text_then_image()
    text, _ = entered.lengths
    return Embeddings(
        text_BTD=tokens_at(embeddings_BSD, layout.index_BK.gather(1, index_BT)),
        image_BID=tokens_at(embeddings_BSD, entered.index_BK.gather(1, index_BN[:, text:])),
        valid_BI=valid_BN[:, text:],
    )


def _context(
    state: ForwardState,
    layout: TokenLayout,
    attention: LayerAttention,
    repeats: int,
    causal: bool,
) -> Context | None:
    """Keys that the text attends to besides the tokens of a view; None if there are none.

    Args:
        state: of the call.
        layout: of the layer.
        attention: of the layer.
        repeats: heads of queries to one of keys.
        causal: whether a token of the prompt sees only those before it.
    """
    num_cached = attention.keys_BhLC.shape[2] - layout.index_BK.shape[1]
    limited = attention.window is not None or attention.softcap is not None
    if not num_cached and not max(state.num_hidden) and not limited:
        return None
    # Tokens of this call that the view leaves out, as many slots as any sample has of them.
    hidden = Plan.keep(layout.hidden_BK, max(state.num_hidden))
    assert hidden.index_BK is not None
    keys_BHMC = _of_heads(attention.keys_BhLC[:, :, num_cached:], hidden.index_BK, repeats)
    position_BM, valid_BM = hidden.reduce(layout.index_BK + state.past), hidden.mask_BK
    if num_cached:
        # Before them those of the cache: the last ones where a window has passed.
        no_position_B0 = layout.index_BK[:, :0]
        cached_BM, filled_BM = kv_cache.with_cached(
            attention.cached, state.past, num_cached, no_position_B0, None
        )
        valid_cached_BM = (
            torch.ones_like(cached_BM, dtype=torch.bool) if filled_BM is None else filled_BM
        )
        if state.mask_BL is not None:
            mask_BL = state.mask_BL.to(cached_BM.device)
            valid_cached_BM = valid_cached_BM & mask_BL.gather(1, cached_BM)
        cached_keys = attention.keys_BhLC[:, :, :num_cached]
        cached_keys = cached_keys if repeats == 1 else cached_keys.repeat_interleave(repeats, 1)
        keys_BHMC = torch.cat([cached_keys, keys_BHMC], 2)
        position_BM = torch.cat([cached_BM, position_BM], 1)
        valid_BM = torch.cat([valid_cached_BM, valid_BM], 1)
    return Context(
        keys_BHMC,
        valid_BM,
        position_BM if causal else None,
        attention.window,
        attention.softcap,
    )


def _of_heads(x_BHKC: Tensor, index_BN: Tensor, repeats: int = 1) -> Tensor:
    """The tokens with these indices in every head, each head `repeats` times; copied once."""
    batch, heads, count, width = x_BHKC.shape
    # Rows of x as [B*H*K,C]: those of a head begin at a multiple of its length.
    head_H = torch.arange(heads * repeats, device=index_BN.device) // repeats
    sample_B1 = heads * torch.arange(batch, device=index_BN.device)[:, None]
    row_BHN = count * (sample_B1 + head_H)[..., None] + index_BN[:, None]
    return x_BHKC.reshape(-1, width).index_select(0, row_BHN.flatten()).view(*row_BHN.shape, width)
