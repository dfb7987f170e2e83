"""A start for positions: where a patch is should not have to be learned before what is on it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def start_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Set a new ViLT model's image positions to two-dimensional sines and cosines (He et al., MAE, CVPR 2022).

    transformers starts them at zero, where neighbouring patches know nothing of each other; small models then take
    long to see shapes. They are trained on from there.
    """
    table = model.base_model.embeddings.position_embeddings
    width, side = table.shape[2], round((table.shape[1] - 1) ** 0.5)
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    down, across = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    table[0, 1:, : 4 * (width // 4)] = torch.cat([down, across], dim=-1).flatten(0, 1)
    return model
