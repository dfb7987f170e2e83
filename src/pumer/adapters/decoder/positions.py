"""Positions of the tokens left, counted anew: the `renumber` option of `pumer.apply`.

A token has the position that the model gave it, less one for every token before it that is gone
from its layer, as in a prompt of nothing but what the layer has. What is cached counts too, so that
decoding goes on from there. Every layer counts its own.

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.decoder.kv_cache import CacheLayout
from pumer.adapters.decoder.prompt import ForwardState, TokenLayout


def renumber(
    language: Any,
    state: ForwardState,
    layer_index: int,
    layout: TokenLayout | None,
    cached: CacheLayout | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The positions among a layer's arguments, counted anew.

    Args:
        language: the model whose layer it is.
        state: of the call.
        layer_index: of the layer.
        layout: its tokens; None for those of the prompt.
        cached: what its cache holds; None for every token.
        arguments: of the layer, for its tokens already.
    """
    position_ids = numbered(state, layout, cached, arguments["position_ids"])
    if arguments["position_embeddings"] is None:  # a layer that reads no positions
        return {"position_ids": position_ids}
    like, _ = arguments["position_embeddings"]
    embeddings = _rotary(language, layer_index, like, position_ids)
    return {"position_ids": position_ids, "position_embeddings": embeddings}


def numbered(
    state: ForwardState,
    layout: TokenLayout | None,
    cached: CacheLayout | None,
    position_ids: Tensor,
) -> Tensor:
    """Positions [B,K] less the tokens gone before each; any number from 0 at empty slots."""
    position_BK, filled_BK = state.positions_of(layout, 1, position_ids.device)
    filled_BK = torch.ones_like(position_BK) if filled_BK is None else filled_BK.long()
    before_BK = filled_BK.cumsum(1) - 1 + _cached(state, cached, position_BK.device)
    return (position_ids - (position_BK - before_BK).to(position_ids.device)).clamp_min(0)


def _cached(state: ForwardState, cached: CacheLayout | None, device: torch.device) -> Tensor | int:
    """How many tokens before those of this call a layer has: one number, or [B,1]."""
    if cached is None or not state.past:
        return state.past
    position_BK, filled_BK = cached.extend_to(state.past)
    return position_BK.shape[1] if filled_BK is None else filled_BK.sum(1, keepdim=True).to(device)


def _rotary(language: Any, layer_index: int, like: Tensor, position_ids: Tensor) -> Any:
    """Rotary embeddings of these positions, as the model makes them for this layer."""
    rotary = language.rotary_emb
    kinds = inspect.signature(type(rotary).forward).parameters
    more = (language.config.layer_types[layer_index],) if "layer_type" in kinds else ()
    return rotary(like, position_ids, *more)
