"""Seam A inside a vision tower: CLIP's encoder, as transformers has it.

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
from pumer.adapters.encoder.reduce import Axis
from pumer.adapters.forward import run_block
from pumer.reducers import Plan, Reducer
from pumer.reducers.tokens import Grid


@dataclass(frozen=True)
class Encoded:
    """What a vision tower gives; rows can be taken like those of a tensor.

    Args:
        states_BID: with [CLS] first.
        sizes_BI: patches that each token stands for, None if one each.
        plan: where the tower's own tokens went, None if nothing was reduced.
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
    """Every token of a `CLIPVisionModel` after its last layer, normed; reduced on the way if the
    patch says so."""
    reducer = patch.reducer.traits.vision_reducer
    grid = tuple(side // vision.config.patch_size for side in pixel_values.shape[-2:])
    if reducer is None:
        states = vision(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        patch.tower = [states.shape[1]] * (len(vision.encoder.layers) + 1)
        return Encoded(vision.post_layernorm(states), grid=grid)
    embedded = vision.embeddings(pixel_values, interpolate_pos_encoding=True)
    for states, axis in layers(vision, embedded, patch, grid):  # noqa: B007 - the last ones are what is wanted
        pass
    return Encoded(vision.post_layernorm(states), axis.sizes_BN, axis.plan, grid)


def layers(
    vision: Any, embedded_BID: Tensor, patch: Patch, grid: Grid | None = None
) -> Iterator[tuple[Tensor, Axis]]:
    """States and axis before the first layer of a `CLIPVisionModel` and after every one, the
    tower's reducer at work.

    Args:
        vision: the tower.
        embedded_BID: what its embeddings give, [CLS] first.
        patch: whose reducer acts.
        grid: rows and columns of patches.
    """
    reducer = patch.reducer.traits.vision_reducer
    assert reducer is not None
    states = vision.pre_layrnorm(embedded_BID)
    ones = torch.ones(states.shape[:2], device=states.device)
    raster = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2]) - 1
    axis = Axis(0, ones.bool(), ones, None, grid, raster)
    lengths = [states.shape[1]]
    patch.tower = lengths  # of this call alone
    yield states, axis
    for layer_index, layer in enumerate(vision.encoder.layers):
        states, axis = _layer(layer, patch, reducer, layer_index, states, axis)
        lengths.append(states.shape[1])
        yield states, axis


def _layer(
    layer: Any, patch: Patch, reducer: Reducer, layer_index: int, states: Tensor, axis: Axis
) -> tuple[Tensor, Axis]:
    return run_block(layer, partial(_block, layer, patch, reducer, layer_index), states, axis)


def _block(
    layer: Any, patch: Patch, reducer: Reducer, layer_index: int, states: Tensor, axis: Axis
) -> tuple[Tensor, Axis]:
    """In place of `CLIPEncoderLayer.forward`, which has no opening between attention and MLP."""
    states, axis = _attend_and_reduce(layer, patch, reducer, layer_index, states, axis)
    return inplace.add(layer.mlp(layer.layer_norm2(states)), states), axis


def _attend_and_reduce(
    layer: Any, patch: Patch, reducer: Reducer, layer_index: int, states: Tensor, axis: Axis
) -> tuple[Tensor, Axis]:
    """A function of its own, so that queries, keys and values are gone when the MLP runs."""
    module = layer.self_attn
    normed = layer.layer_norm1(states)
    queries, keys, values = (
        project(normed).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    attention_bias = None
    if axis.plan is not None and (
        reducer.traits.proportional_attention or reducer.traits.dynamic_length
    ):
        attention_bias = kernels.attention_bias(
            axis.mask_BN,
            axis.sizes_BN if reducer.traits.proportional_attention else None,
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
        reducer.traits.needs_attention and reducer.reduces_at(layer_index),
    )
    states = inplace.add(module.out_proj(context.transpose(1, 2).flatten(2)), states)
    return encoder.reduce(patch, layer_index, states, axis, queries, keys, attention, tower=True)[
        :2
    ]
