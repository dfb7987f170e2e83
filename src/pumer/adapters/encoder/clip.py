"""The vision tower of a joint encoder: CLIP's, as transformers has it, reduced inside.

Shape suffixes: B batch, I image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.forward import run_block
from pumer.adapters.tower.axis import Rows
from pumer.adapters.tower.run import TowerSpec, block
from pumer.reducers import Plan
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
    reducer.

    The layers are run here and not by the model's own forward, so that all is one graph under
    torch.compile.
    """
    grid = tuple(side // vision.config.patch_size for side in pixel_values.shape[-2:])
    layers = vision.encoder.layers
    if patch.traits.vision_reducer is None:
        states = vision(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        patch.tower = [states.shape[1]] * (len(layers) + 1)
        return Encoded(vision.post_layernorm(states), grid=grid)
    states = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    spec, axis = TowerSpec(tuple(range(len(layers))), len(layers)), Rows(num_prefix_tokens=1)
    layout = axis.layout(states, grid, None)
    lengths = [states.shape[1]]
    patch.tower = lengths  # of this call alone
    for layer_index, layer in enumerate(layers):
        run = partial(block, layer, patch, spec, layer_index, None)
        states, layout, _ = run_block(layer, run, states, layout, axis)
        lengths.append(states.shape[1])
    return Encoded(vision.post_layernorm(states), layout.sizes_BN, layout.plan, grid)
