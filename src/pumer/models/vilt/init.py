"""Initialization of new, small models, from local attention or a trained ViLT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def init_local_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Initialize a new ViLT model so that tokens attend to near and similar tokens.

    Position embeddings become two-dimensional sines and cosines (zeros in transformers), and keys
    start as queries, so that attention is similarity (Trockman and Kolter, "Mimetic Initialization
    of Self-Attention Layers", ICML 2023). Small models learn shapes faster with it.
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


@torch.no_grad()
def init_tower_from_vilt(vision: PreTrainedModel, vilt: PreTrainedModel) -> None:
    """Initialize a new CLIP vision tower from a ViLT's patch embeddings and first blocks.

    A ViLT block and a CLIP layer differ only in the activation: configure the tower with ViLT's.

    Raises ValueError if widths or patches differ, or the tower has more layers than the ViLT.
    """
    source, old, new = vilt.base_model, vilt.config, vision.config
    same = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "patch_size",
        "image_size",
        "hidden_act",
    )
    different = [name for name in same if getattr(old, name) != getattr(new, name)]
    if different or len(vision.encoder.layers) > len(source.encoder.layer):
        raise ValueError(
            "the vision tower cannot start from this ViLT: "
            f"{', '.join(different) or 'num_hidden_layers'} differ"
        )
    projection = source.embeddings.patch_embeddings.projection
    image_type_embedding = source.embeddings.token_type_embeddings.weight[1]
    vision.embeddings.patch_embedding.weight.copy_(projection.weight)
    vision.embeddings.class_embedding.copy_(
        source.embeddings.cls_token[0, 0] + image_type_embedding
    )
    vision.embeddings.position_embedding.weight.copy_(source.embeddings.position_embeddings[0])
    vision.embeddings.position_embedding.weight[1:] += projection.bias + image_type_embedding
    # ViLT has no such norm: scale by the typical standard deviation to change least.
    vision.pre_layrnorm.weight.fill_(vision.embeddings(plain_images(new)).std(-1).mean())
    for layer, block in zip(vision.encoder.layers, source.encoder.layer, strict=False):
        attention = block.attention.attention
        for ours, theirs in (
            (layer.self_attn.q_proj, attention.query),
            (layer.self_attn.k_proj, attention.key),
            (layer.self_attn.v_proj, attention.value),
            (layer.self_attn.out_proj, block.attention.output.dense),
            (layer.mlp.fc1, block.intermediate.dense),
            (layer.mlp.fc2, block.output.dense),
            (layer.layer_norm1, block.layernorm_before),
            (layer.layer_norm2, block.layernorm_after),
        ):
            ours.load_state_dict(theirs.state_dict())


def plain_images(config: Any) -> Tensor:
    """Images with one colour per patch [8,3,H,W], to measure a tower's typical outputs."""
    side = config.image_size // config.patch_size
    colours = torch.rand(8, config.num_channels, side, side)
    return 2 * nn.functional.interpolate(colours, scale_factor=config.patch_size) - 1
