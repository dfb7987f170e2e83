"""Initialization of new, small BridgeTower models from a ViLT."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pumer.models.meter.init import init_text_from_vilt
from pumer.models.vilt.init import plain_images


@torch.no_grad()
def init_bridgetower_from_vilt(model: PreTrainedModel, vilt: PreTrainedModel) -> PreTrainedModel:
    """Initialize a new BridgeTower's word embeddings and image tower from a trained ViLT.

    Layers beyond the ViLT's are new. The tower's MLPs are four times as wide as its states:
    channels beyond the ViLT's start without effect.

    Raises ValueError if vocabularies, widths or patches differ.
    """
    init_text_from_vilt(model.base_model.text_model, vilt)
    _init_tower(model.base_model.vision_model.visual, model.config.vision_config, vilt)
    return model


def _init_tower(visual: Any, config: Any, vilt: PreTrainedModel) -> None:
    source, old = vilt.base_model, vilt.config
    different = [
        name
        for name in ("hidden_size", "patch_size", "image_size")
        if getattr(old, name) != getattr(config, name)
    ]
    if old.num_attention_heads != config.hidden_size // 64:
        different.append("num_attention_heads (the tower has one per 64 channels)")
    if old.intermediate_size > 4 * config.hidden_size:
        different.append("intermediate_size")
    if different:
        raise ValueError(
            f"the vision tower cannot start from this ViLT: {', '.join(different)} differ"
        )
    embeddings, projection = visual.embeddings, source.embeddings.patch_embeddings.projection
    image_type_embedding = source.embeddings.token_type_embeddings.weight[1]
    embeddings.patch_embedding.weight.copy_(projection.weight)
    embeddings.class_embedding.copy_(source.embeddings.cls_token[0, 0] + image_type_embedding)
    embeddings.position_embedding.weight.copy_(source.embeddings.position_embeddings[0])
    embeddings.position_embedding.weight[1:] += projection.bias + image_type_embedding
    # ViLT has no such norm: scale by the typical standard deviation to change least.
    visual.ln_pre.weight.fill_(embeddings(plain_images(config)).std(-1).mean())
    inner = old.intermediate_size
    for layer, block in zip(visual.transformer.resblocks, source.encoder.layer, strict=False):
        attention = block.attention.attention
        parts = (attention.query, attention.key, attention.value)
        layer.attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        layer.mlp.c_fc.weight[:inner] = block.intermediate.dense.weight
        layer.mlp.c_fc.bias[:inner] = block.intermediate.dense.bias
        layer.mlp.c_proj.weight.zero_()
        layer.mlp.c_proj.weight[:, :inner] = block.output.dense.weight
        layer.mlp.c_proj.bias.copy_(block.output.dense.bias)
        for ours, theirs in (
            (layer.attn.out_proj, block.attention.output.dense),
            (layer.ln_1, block.layernorm_before),
            (layer.ln_2, block.layernorm_after),
        ):
            ours.load_state_dict(theirs.state_dict())
