"""A start for new, small ViLTs: what is near and alike should not have to be learned before what it is."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def start_local(model: PreTrainedModel) -> PreTrainedModel:
    """Let every token of a new ViLT model attend to what is near it and looks like it, before any training.

    Image positions become two-dimensional sines and cosines (transformers starts them at zero, where neighbours know
    nothing of each other), and keys start as queries, so that attention is similarity (Trockman and Kolter, "Mimetic
    Initialization of Self-Attention Layers", ICML 2023). Without this, small models take long to see shapes.
    """
    table = model.base_model.embeddings.position_embeddings
    quarter, side = table.shape[2] // 4, round((table.shape[1] - 1) ** 0.5)
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(quarter) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    down, across = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    table[0, 1:, : 4 * quarter] = torch.cat([down, across], dim=-1).flatten(0, 1)
    for layer in model.base_model.encoder.layer:
        layer.attention.attention.key.weight.copy_(layer.attention.attention.query.weight)
    return model
