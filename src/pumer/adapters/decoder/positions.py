"""Positions of the tokens that are left, counted anew: what `renumber` of `pumer.apply` asks for.

A token has the position that the model gave it, less one for every token before it that is gone
from its layer, as in a prompt of nothing but what the layer has. What is cached counts too, so that
decoding goes on from there. Every layer counts its own.

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.decoder.kv_cache import Held
from pumer.adapters.decoder.prompt import Axis, ForwardState


def renumber(
    language: Any,
    state: ForwardState,
    layer_index: int,
    axis: Axis | None,
    held: Held | None,
    kwargs: dict[str, Any],
) -> None:
    """Change the positions among a layer's arguments, which are those of its tokens already.

    Args:
        language: the model whose layer it is.
        state: of the call.
        layer_index: number of the layer.
        axis: its tokens; None for those of the prompt.
        held: what its cache holds; None for every token.
        kwargs: its arguments.
    """
    position_ids, rotary = kwargs["position_ids"], kwargs["position_embeddings"]
    numbered = partial(_numbered, state, axis, held, position_ids)
    position_ids = state.once(("renumber", position_ids, axis, held), numbered)
    embed = partial(_rotary, language, layer_index, rotary[0], position_ids)
    kwargs["position_ids"] = position_ids
    # The rotary embeddings that a layer got say which of several kinds it takes.
    kwargs["position_embeddings"] = state.once(("renumber", rotary, position_ids), embed)


def _numbered(
    state: ForwardState,
    axis: Axis | None,
    held: Held | None,
    position_ids: Tensor,
) -> Tensor:
    """Positions [B,K] less the tokens gone before each; any number from 0 at empty slots."""
    place_BK, filled_BK = state.places_of(axis, 1, position_ids.device)
    filled_BK = torch.ones_like(place_BK) if filled_BK is None else filled_BK.long()
    before_BK = filled_BK.cumsum(1) - 1 + _cached(state, held, place_BK.device)
    return (position_ids - (place_BK - before_BK).to(position_ids.device)).clamp_min(0)


def _cached(state: ForwardState, held: Held | None, device: torch.device) -> Tensor | int:
    """How many tokens before those of this call a layer has: one number, or [B,1]."""
    if held is None or not state.past:
        return state.past
    place_BK, filled_BK = held.upto(state.past)
    return place_BK.shape[1] if filled_BK is None else filled_BK.sum(1, keepdim=True).to(device)


def _rotary(language: Any, layer_index: int, like: Tensor, position_ids: Tensor) -> Any:
    """Rotary embeddings of these positions, as the model makes them for this layer."""
    rotary = language.rotary_emb
    kinds = inspect.signature(type(rotary).forward).parameters
    more = (language.config.layer_types[layer_index],) if "layer_type" in kinds else ()
    return rotary(like, position_ids, *more)
