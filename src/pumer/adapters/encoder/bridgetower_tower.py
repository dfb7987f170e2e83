"""A layer of BridgeTower's image tower: CLIP's, with the attention of torch.

Shape suffixes: B batch, I image tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder import inplace
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import timed
from pumer.adapters.tower.axis import layout_of
from pumer.reducers.tokens import Grid


def entry_layout(states_BID: Tensor, grid: Grid | None) -> EncoderLayout:
    """The tokens before the first layer, [CLS] first."""
    ones = torch.ones(states_BID.shape[:2], dtype=torch.bool, device=states_BID.device)
    return layout_of(ones, grid, 1)


def run_layer(
    block: Any, stock: Any, patch: Patch, layer_index: int, states: Tensor, layout: Any = None
) -> Any:
    """Wraps `BridgeTowerResidualAttention.forward`: states and layout; the stock layer where the
    tower is called by itself."""
    if not isinstance(layout, EncoderLayout):
        return stock(states, layout)
    states, layout = _attend_and_reduce(block, patch, layer_index, states, layout)
    inner = inplace.quick_gelu(block.mlp.gelu, block.mlp.c_fc(block.ln_2(states)))
    return inplace.add(block.mlp.c_proj(inner), states), layout


def _attend_and_reduce(
    block: Any, patch: Patch, layer_index: int, states: Tensor, layout: EncoderLayout
) -> tuple[Tensor, EncoderLayout]:
    """A separate function, so that queries, keys and values are freed before the MLP."""
    module, reducer, normed = block.attn, patch.traits.vision_reducer, block.ln_1(states)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    queries, keys, values = (
        nn.functional.linear(normed, weight, bias)
        .unflatten(-1, (module.num_heads, -1))
        .transpose(1, 2)
        for weight, bias in zip(weights, biases, strict=True)
    )
    bias, wanted = None, False
    if reducer is not None:
        traits = reducer.traits
        wanted = traits.needs_attention and reducer.reduces_at(layer_index)
        if layout.plan is not None and (traits.proportional_attention or traits.dynamic_length):
            sizes = layout.sizes_BN if traits.proportional_attention else None
            bias = kernels.attention_bias(layout.mask_BN, sizes, states.dtype)
    dropout = module.dropout if module.training else 0.0
    context, attention = kernels.attend(
        queries, keys, values, bias, patch.attention, dropout, wanted
    )
    states = inplace.add(module.out_proj(context.transpose(1, 2).flatten(2)), states)
    if reducer is None:
        return states, layout
    return _reduce(patch, layer_index, states, layout, queries, keys, attention)


@timed("encoder")
def _reduce(
    patch: Patch,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
    queries: Tensor,
    keys: Tensor,
    attention: Tensor | None,
) -> tuple[Tensor, EncoderLayout]:
    layout, plan, _ = encoder.choose(
        patch, layer_index, states, layout, queries, keys, attention, tower=True
    )
    return states if plan is None else plan.reduce(states), layout
