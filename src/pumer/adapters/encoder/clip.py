"""Reduction inside a vision tower: CLIP's encoder, as transformers has it.

Shape suffixes: B batch, I image tokens, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder import inplace
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import run_block
from pumer.reducers import Plan, Reducer
from pumer.reducers.tokens import Grid


@dataclass(frozen=True)
class Encoded:
    """The output of a vision tower; indexing selects rows as for a tensor.

    Args:
        states_BID: with [CLS] first.
        sizes_BI: patches that each token stands for; None if one each.
        plan: where the tower's tokens went; None without a reduction.
        grid: rows and columns of patches.
    """

    states_BID: Tensor
    sizes_BI: Tensor | None = None
    plan: Plan | None = None
    grid: Grid | None = None

    def __len__(self) -> int:
        return len(self.states_BID)

    def to(self, device: torch.device, non_blocking: bool = False) -> Encoded:
        """The same on another device."""
        sizes = None if self.sizes_BI is None else self.sizes_BI.to(device)
        plan = None if self.plan is None else self.plan.to(device)
        return Encoded(self.states_BID.to(device), sizes, plan, self.grid)

    def __getitem__(self, rows: Any) -> Encoded:
        plan = None if self.plan is None else self.plan.rows(rows)
        sizes = None if self.sizes_BI is None else self.sizes_BI[rows]
        return Encoded(self.states_BID[rows], sizes, plan, self.grid)


def encode(vision: Any, pixel_values: Tensor, patch: Patch) -> Encoded:
    """The normed tokens of a `CLIPVisionModel` after its last layer, reduced by the tower's
    reducer."""
    reducer = patch.traits.vision_reducer
    grid = tuple(side // vision.config.patch_size for side in pixel_values.shape[-2:])
    if reducer is None:
        states = vision(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        patch.tower = [states.shape[1]] * (len(vision.encoder.layers) + 1)
        return Encoded(vision.post_layernorm(states), grid=grid)
    embedded = vision.embeddings(pixel_values, interpolate_pos_encoding=True)
    for states, layout in layers(vision, embedded, patch, grid):  # noqa: B007 - the last ones are used
        pass
    return Encoded(vision.post_layernorm(states), layout.sizes_BN, layout.plan, grid)


def layers(
    vision: Any, embedded_BID: Tensor, patch: Patch, grid: Grid | None = None
) -> Iterator[tuple[Tensor, EncoderLayout]]:
    """States and layout before the first layer of a `CLIPVisionModel` and after every layer, with
    the tower's reducer active.

    Args:
        vision: the tower.
        embedded_BID: output of its embeddings, [CLS] first.
        patch: of the model.
        grid: rows and columns of patches.
    """
    reducer = patch.traits.vision_reducer
    assert reducer is not None
    states = vision.pre_layrnorm(embedded_BID)
    layout = image_layout(states, grid)
    lengths = [states.shape[1]]
    patch.tower = lengths  # of this call alone
    yield states, layout
    for layer_index, layer in enumerate(vision.encoder.layers):
        block = partial(run_layer, layer, patch, reducer, layer_index)
        states, layout = run_block(layer, block, states, layout)
        lengths.append(states.shape[1])
        yield states, layout


def image_layout(states_BID: Tensor, grid: Grid | None) -> EncoderLayout:
    """The tokens of a vision tower before its first layer, [CLS] first."""
    ones = torch.ones(states_BID.shape[:2], device=states_BID.device)
    raster = torch.arange(states_BID.shape[1], device=states_BID.device).expand(ones.shape) - 1
    return EncoderLayout(0, ones.bool(), ones, None, grid, raster)


def run_layer(
    layer: Any,
    patch: Patch,
    reducer: Reducer | None,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
) -> tuple[Tensor, EncoderLayout]:
    """Replaces `CLIPEncoderLayer.forward`, which has no hook between attention and MLP."""
    states, layout = _attend_and_reduce(layer, patch, reducer, layer_index, states, layout)
    return inplace.add(layer.mlp(layer.layer_norm2(states)), states), layout


def _attend_and_reduce(
    layer: Any,
    patch: Patch,
    reducer: Reducer | None,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
) -> tuple[Tensor, EncoderLayout]:
    """A separate function, so that queries, keys and values are freed before the MLP."""
    module = layer.self_attn
    normed = layer.layer_norm1(states)
    queries, keys, values = (
        project(normed).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    attention_bias = None
    if (
        reducer is not None
        and layout.plan is not None
        and (reducer.traits.proportional_attention or reducer.traits.dynamic_length)
    ):
        attention_bias = kernels.attention_bias(
            layout.mask_BN,
            layout.sizes_BN if reducer.traits.proportional_attention else None,
            states.dtype,
        )
    dropout = module.dropout if module.training else 0.0
    context, attention = kernels.attend(
        queries,
        keys,
        values,
        attention_bias,
        patch.attention,
        dropout,
        reducer is not None and reducer.traits.needs_attention and reducer.reduces_at(layer_index),
    )
    states = inplace.add(module.out_proj(context.transpose(1, 2).flatten(2)), states)
    if reducer is None:
        return states, layout
    return encoder.reduce(patch, layer_index, states, layout, queries, keys, attention, tower=True)[
        :2
    ]
