"""The end of a call: states, hidden states and attention maps in the prompt's length, and what is
noted.

Shape suffixes: B samples, S tokens of the prompt, K tokens of a layer, L keys of a layer, D
channels, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch, timed
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prompt import Axis, ForwardState


@timed("decoder")
def finish(patch: Patch, state: ForwardState, output: Any, cache: Any) -> None:
    """Lengthen what the language model gives, and tell the cache what it holds."""
    if output.get("attentions") is not None:
        output.attentions = tuple(
            None if map_BHKL is None else _lengthened(map_BHKL, state, cache, layer_index)
            for layer_index, map_BHKL in enumerate(output.attentions)
        )
    if not state.axes:
        return
    last = state.axes[-1]
    _note(patch, state)
    if cache is not None:
        kv_cache.write(cache, _held(state, cache))
    if last.whole:
        return
    output.last_hidden_state = spread(output.last_hidden_state, last, state.length)
    if output.get("hidden_states") is not None:
        axes = (state.axes[0], *state.axes)
        output.hidden_states = tuple(
            None if states is None else spread(states, axis, state.length)
            for states, axis in zip(output.hidden_states, axes, strict=True)
        )


def spread(states_BKD: Tensor, axis: Axis, length: int) -> Tensor:
    """States of every token of the prompt: where one is gone, those of the last one before it that
    is left."""
    if axis.whole:
        return states_BKD
    at_BS = axis.spread(length).to(states_BKD.device)
    return states_BKD.gather(1, at_BS[..., None].expand(-1, -1, states_BKD.shape[2]))


def _lengthened(map_BHKL: Tensor, state: ForwardState, cache: Any, layer_index: int) -> Tensor:
    """A layer's attention map over all tokens as the model counts them: nobody attends to what is
    gone."""
    axis = state.axes[layer_index] if state.axes else None
    held = kv_cache.held(cache, layer_index)
    if held is None and (axis is None or axis.whole):
        return map_BHKL
    batch, heads, _, keys = map_BHKL.shape
    places_BL, filled_BL = state.places_of(axis, batch, map_BHKL.device)
    if state.past:
        places_BL, filled_BL = kv_cache.before(held, state.past, None, places_BL, filled_BL)
    places_BL = places_BL[:, -keys:]
    if filled_BL is not None:
        map_BHKL = map_BHKL * filled_BL[:, None, None, -keys:]
    total = state.past + state.length
    columns = places_BL[:, None, None].expand_as(map_BHKL)
    full = map_BHKL.new_zeros(*map_BHKL.shape[:3], total).scatter_add(3, columns, map_BHKL)
    if axis is None or axis.whole:
        return full
    at_BS = axis.spread(state.length)
    return full.gather(2, at_BS[:, None, :, None].expand(-1, heads, -1, total))


def _note(patch: Patch, state: ForwardState) -> None:
    """Keep the lengths of the sample with the most tokens: those planned, and those that there
    really were."""
    planned, lengths = [], []
    widths = (*state.widths, state.widths[-1])
    for axis, width in zip((*state.axes, state.axes[-1]), widths, strict=True):
        lengths_after = [
            num_untouched + sum(count)
            for num_untouched, count in zip(state.rest, axis.counts, strict=True)
        ]
        text, image = max(axis.counts, key=sum)
        planned.append((text, image))
        lengths.append((text, image + width - max(lengths_after)))
    patch.planned, patch.lengths, patch.entry = planned, lengths, state.entry
    patch.kept = _kept(state, state.axes[-1])


def _kept(state: ForwardState, axis: Axis) -> Tensor:
    """Places of the real tokens of an axis, in order, -1 behind them [B,K]."""
    places_BK, filled_BK = axis.index_BK + state.past, axis.filled_BK
    real_BK = torch.ones_like(places_BK, dtype=torch.bool) if filled_BK is None else filled_BK
    if state.mask_BL is not None:
        real_BK = real_BK & state.mask_BL.to(places_BK.device).gather(1, places_BK)
    order_BK = (~real_BK).to(torch.uint8).argsort(dim=1, stable=True)
    return places_BK.masked_fill(~real_BK, -1).gather(1, order_BK)


def _held(state: ForwardState, cache: Any) -> dict[int, kv_cache.Held]:
    """What every layer with fewer tokens holds after this call."""
    layouts: dict[Any, kv_cache.Held] = {}
    result = {}
    for layer_index, axis in enumerate(state.axes):
        if axis.whole or layer_index >= len(cache.layers):
            continue
        if not cache.layers[layer_index].is_initialized:
            continue
        held = kv_cache.held(cache, layer_index)
        key = id(axis), id(held)
        if key not in layouts:  # layers that hold the same share one, and one mask
            places = axis.index_BK + state.past, axis.filled_BK
            if state.past:
                places = kv_cache.before(held, state.past, None, *places)
            layouts[key] = kv_cache.Held(*places, state.past + state.length)
        result[layer_index] = layouts[key]
    return result
