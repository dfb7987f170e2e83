"""Prompts that get shorter before the language model, which then runs as it is: for families whose
layers cannot lose tokens on the way (`DecoderAdapter.before_only`).

The model goes on counting every token of the prompt, its language model those that it is given: the
cache tells each of them its own number. Kept tokens keep their positions.

Shape suffixes: B samples, S tokens of the prompt, K tokens that are left of it, L keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.decoder import kv_cache, positions
from pumer.adapters.decoder import reduce as decoder_reduce
from pumer.adapters.decoder.attention import gather_tokens
from pumer.adapters.decoder.prompt import ForwardState, TokenLayout
from pumer.adapters.forward import timed
from pumer.reducers import EMBEDDINGS

Hooks = Any
STATE = "pumer_state"
"""Keyword argument by which a call's state reaches the layers, and with them their
recomputation."""
STATES = (
    "Some layers of its language model keep a state in place of keys (linear attention, state "
    "spaces or short convolutions), from which no token can be taken out."
)
SELECTS = (
    "Its attention chooses keys by an index of its own, which counts every token of the prompt."
)
BEFORE = "DivPrune, HiPrune, FasterVLM and others of docs/choose.md"
"""Reducers that act there."""


def run(
    hooks: Hooks, state: ForwardState, stock: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """The language model's forward, on fewer tokens where the call brings images."""
    kwargs = _arguments(hooks, state, kwargs)
    state.in_language = True
    try:
        return stock(*args, **kwargs, **{STATE: state})
    finally:
        state.in_language = False


@timed("decoder")
def _arguments(hooks: Hooks, state: ForwardState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the language model for the tokens that are left, and those that its cache
    holds."""
    states = kwargs.get("inputs_embeds")
    states = kwargs["input_ids"] if states is None else states
    state.cache, (batch, state.length) = kv_cache.find(kwargs), states.shape[:2]
    state.past = kv_cache.length(state.cache)
    kwargs = dict(kwargs)
    if state.layout is not None:
        kwargs["inputs_embeds"] = states = _reduced(hooks, state, states)
    layout = None if state.layout is None or state.layout.unreduced else state.layout
    cached = kv_cache.layout(state.cache, 0) if state.past else None
    if layout is None and cached is None:
        return kwargs
    state.shortened = True
    along = {name: kwargs[name] for name in hooks.spec.along_tokens if name in kwargs}
    along["position_ids"] = kwargs.get("position_ids")
    if along["position_ids"] is None:
        counted = torch.arange(state.past, state.past + state.length, device=states.device)
        along["position_ids"] = counted.expand(batch, -1)
    if layout is not None:
        along = {
            name: gather_tokens(value, layout.index_BK, state.length)
            for name, value in along.items()
        }
    if hooks.patch.renumber or not hooks.spec.keeps_positions:
        state.counted_BK = positions.numbered(state, layout, cached, along["position_ids"])
    if hooks.patch.renumber:
        along["position_ids"] = state.counted_BK
    mask = _mask(state, layout, cached, batch, states.device)
    return kwargs | along | {"attention_mask": mask}


def before_layer(hooks: Hooks, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a layer: flash attention takes gaps between positions for the ends of packed samples,
    and some indices of keys take positions for places among the keys."""
    state: ForwardState | None = kwargs.pop(STATE, None)
    if state is not None and state.shortened:
        if hooks.language.config._attn_implementation.startswith("flash"):
            kwargs["position_ids"] = None
        elif not hooks.spec.keeps_positions:
            kwargs["position_ids"] = state.counted_BK
    return args, kwargs


def _reduced(hooks: Hooks, state: ForwardState, states_BSD: Tensor) -> Tensor:
    """The embeddings of the tokens that are left."""
    plan = None
    if EMBEDDINGS in hooks.acts_after or decoder_reduce.has_merged_images(state):
        states_BSD, plan = decoder_reduce.reduce(
            hooks.patch, state, EMBEDDINGS, states_BSD, hooks.spec.causal
        )
    assert state.layout is not None
    depth = len(hooks.language.layers)
    state.layouts, state.plans = [state.layout] * depth, [plan] * depth
    state.widths = [states_BSD.shape[1]] * depth
    return states_BSD


def _mask(
    state: ForwardState,
    layout: TokenLayout | None,
    cached: kv_cache.CacheLayout | None,
    batch: int,
    device: torch.device,
) -> Tensor:
    """The attention mask [B,L] of the tokens that are here. There is always one: without it,
    transformers would take gaps between positions for the ends of packed samples."""
    position_BL, filled_BL = state.positions_of(layout, batch, device)
    if state.past:
        position_BL, filled_BL = kv_cache.with_cached(
            cached, state.past, None, position_BL, filled_BL
        )
    mask = state.inputs.get("attention_mask")
    if mask is None:
        mask_BL = torch.ones_like(position_BL)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        mask_BL = mask.to(device).gather(1, position_BL)
    else:
        raise ValueError(
            "a reduced model takes a two-dimensional attention_mask, 1 for tokens and 0 for padding"
        )
    return mask_BL if filled_BL is None else mask_BL.masked_fill(~filled_BL, 0)
