"""The end of a call: outputs in the prompt's length, and what the patch and the cache record.

Shape suffixes: B samples, S tokens of the prompt, K tokens of a layer, L keys of a layer, D
channels, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.decoder import kv_cache, short_cache
from pumer.adapters.decoder.prompt import ForwardState, TokenLayout
from pumer.adapters.forward import timed


@timed("decoder")
def finish(patch: Patch, state: ForwardState, output: Any, cache: Any) -> None:
    """Bring the outputs to the prompt's length, and tell the cache what it holds."""
    if output.get("attentions") is not None:
        output.attentions = tuple(
            None if map_BHKL is None else _lengthened(map_BHKL, state, cache, layer_index)
            for layer_index, map_BHKL in enumerate(output.attentions)
        )
    if not state.layouts:
        return
    last = state.layouts[-1]
    _record(patch, state)
    if cache is not None and state.hooks.shortens:
        if not last.unreduced:
            short_cache.write(cache, _cache_layout(state, last, kv_cache.layout(cache, 0)))
    elif cache is not None:
        kv_cache.write(cache, _cache_layouts(state, cache))
    if last.unreduced:
        return
    output.last_hidden_state = expand_states(output.last_hidden_state, last, state.length)
    if output.get("hidden_states") is not None:
        layouts = (state.layouts[0], *state.layouts)
        if state.hooks.shortens:  # one for all, however often layers run
            layouts = (last,) * len(output.hidden_states)
        output.hidden_states = tuple(
            None if states is None else expand_states(states, layout, state.length)
            for states, layout in zip(output.hidden_states, layouts, strict=True)
        )


def expand_states(states_BKD: Tensor, layout: TokenLayout, length: int) -> Tensor:
    """States of every token of the prompt, in one stream or several: a dropped one has those of the
    last kept one before it."""
    if layout.unreduced:
        return states_BKD
    if states_BKD.ndim == 4 and states_BKD.shape[:2] != layout.index_BK.shape:
        return torch.stack([expand_states(stream_BKD, layout, length) for stream_BKD in states_BKD])
    at_BS = layout.index_of_survivor(length).to(states_BKD.device)
    # Streams lie before the samples, or behind the tokens.
    at_BSD = at_BS.view(*at_BS.shape, *[1] * (states_BKD.ndim - 2))
    return states_BKD.gather(1, at_BSD.expand(-1, -1, *states_BKD.shape[2:]))


def _lengthened(map_BHKL: Tensor, state: ForwardState, cache: Any, layer_index: int) -> Tensor:
    """A layer's attention map over all tokens as the model counts them; dropped ones get zero."""
    layout = state.layouts[layer_index] if state.layouts else None
    cached = kv_cache.layout(cache, layer_index)
    if cached is None and (layout is None or layout.unreduced):
        return map_BHKL
    batch, heads, _, keys = map_BHKL.shape
    positions_BL, filled_BL = state.positions_of(layout, batch, map_BHKL.device)
    if state.past:
        positions_BL, filled_BL = kv_cache.with_cached(
            cached, state.past, None, positions_BL, filled_BL
        )
    held = cache.layers if state.past else ()
    prompt = kv_cache.prompt_slots(held[layer_index]) if layer_index < len(held) else 0
    positions_BL = kv_cache.last_held(positions_BL, keys, prompt)
    if filled_BL is not None:
        filled_BL = kv_cache.last_held(filled_BL, keys, prompt)
        map_BHKL = map_BHKL * filled_BL[:, None, None]
    total = state.past + state.length
    columns = positions_BL[:, None, None].expand_as(map_BHKL)
    full = map_BHKL.new_zeros(*map_BHKL.shape[:3], total).scatter_add(3, columns, map_BHKL)
    if layout is None or layout.unreduced:
        return full
    at_BS = layout.index_of_survivor(state.length)
    return full.gather(2, at_BS[:, None, :, None].expand(-1, heads, -1, total))


def _record(patch: Patch, state: ForwardState) -> None:
    """Record the lengths of the longest sample: those planned, and those that it really had."""
    planned, lengths = [], []
    widths = (*state.widths, state.widths[-1])
    for layout, width in zip((*state.layouts, state.layouts[-1]), widths, strict=True):
        lengths_after = [
            num_untouched + sum(count)
            for num_untouched, count in zip(state.num_untouched, layout.counts, strict=True)
        ]
        text, image = max(layout.counts, key=sum)
        planned.append((text, image))
        lengths.append((text, image + width - max(lengths_after)))
    patch.planned, patch.lengths, patch.entry = planned, lengths, state.entry
    patch.kept = _kept(state, state.layouts[-1])


def _kept(state: ForwardState, layout: TokenLayout) -> Tensor:
    """Positions of the real tokens of a layout, in order, -1 behind them [B,K]."""
    positions_BK, filled_BK = layout.index_BK + state.past, layout.filled_BK
    real_BK = torch.ones_like(positions_BK, dtype=torch.bool) if filled_BK is None else filled_BK
    if state.mask_BL is not None:
        real_BK = real_BK & state.mask_BL.to(positions_BK.device).gather(1, positions_BK)
    order_BK = (~real_BK).to(torch.uint8).argsort(dim=1, stable=True)
    return positions_BK.masked_fill(~real_BK, -1).gather(1, order_BK)


def _cache_layout(
    state: ForwardState, layout: TokenLayout, cached: kv_cache.CacheLayout | None
) -> kv_cache.CacheLayout:
    """What a layer holds after this call that held `cached` before it."""
    positions = layout.index_BK + state.past, layout.filled_BK
    if state.past:
        positions = kv_cache.with_cached(cached, state.past, None, *positions)
    return kv_cache.CacheLayout(*positions, state.past + state.length)


def _cache_layouts(state: ForwardState, cache: Any) -> dict[int, kv_cache.CacheLayout]:
    """What every layer with fewer tokens holds after this call."""
    layouts: dict[Any, kv_cache.CacheLayout] = {}
    result = {}
    for layer_index, layout in enumerate(state.layouts):
        shares_keys = state.hooks.key_layers[layer_index] != layer_index
        if layout.unreduced or shares_keys or layer_index >= len(cache.layers):
            continue
        if not cache.layers[layer_index].is_initialized:
            continue
        cached = kv_cache.layout(cache, layer_index)
        key = id(layout), id(cached)
        if key not in layouts:  # layers that hold the same tokens share one, and one mask
            layouts[key] = _cache_layout(state, layout, cached)
        result[layer_index] = layouts[key]
    return result
