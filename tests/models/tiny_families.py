"""Tiny random-weight decoders of the families that go through one matrix of tests."""

from __future__ import annotations

import transformers
from tiny_parts import (
    CLIP,
    IMAGE,
    QWEN_IDS,
    QWEN_TEXT,
    QWEN_VISION,
    TEXT,
    family,
    image_types,
    patches_of_any_size,
    squares,
)
from torch import nn

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@family(squares(16))
def vipllava() -> nn.Module:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=[-2, -3],
    )
    return transformers.VipLlavaForConditionalGeneration(config)


@family(patches_of_any_size, extras=image_types)
def qwen3_vl_moe() -> nn.Module:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=QWEN_TEXT | EXPERTS | {"head_dim": 8}, vision_config=vision, **QWEN_IDS
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)
