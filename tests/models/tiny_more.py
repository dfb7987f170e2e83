"""Tiny random-weight decoders of families that are used less."""

from __future__ import annotations

import torch
import transformers
from tiny_any_size import (
    DEEPSTACK,
    GLM_TEXT,
    PIXTRAL,
    QWEN3_TEXT,
    any_size,
    patches_of_pixels,
    patches_with_places,
)
from tiny_parts import (
    CLIP,
    IMAGE,
    QWEN_IDS,
    QWEN_TEXT,
    TEXT,
    Image,
    family,
    image_types,
    patches_of_any_size,
    squares,
)
from torch import Generator, Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

SIZES = ((4, 6), (8, 4), (6, 10))
"""Rows and columns of patches of every image."""
WIDTHS = {
    name: PIXTRAL[name]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}


@any_size
def cosmos3_omni() -> nn.Module:
    config = transformers.Cosmos3OmniConfig(
        text_config=QWEN3_TEXT | {"model_type": "qwen3_vl_text"},
        vision_config=DEEPSTACK | {"model_type": "qwen3_vl_vision"},
        **QWEN_IDS,
    )
    return transformers.Cosmos3OmniForConditionalGeneration(config)


@any_size
def cohere_compass() -> nn.Module:
    rope = dict.fromkeys(("sliding_attention", "full_attention"), QWEN_TEXT["rope_parameters"])
    config = transformers.CohereCompassConfig(
        text_config=TEXT
        | {
            "sliding_window": 16,
            "layer_types": list(rope) * 2,
            "rope_parameters": rope,
        },
        vision_config=DEEPSTACK,
        **QWEN_IDS,
    )
    return transformers.CohereCompassForConditionalGeneration(config)


@any_size
def cosmos3_edge() -> nn.Module:
    vision = WIDTHS | {"patch_size": 4, "num_patches": 16}
    config = transformers.Cosmos3EdgeConfig(
        text_config=GLM_TEXT | {"head_dim": 8},
        vision_config=vision,
        projector_hidden_size=24,
        **QWEN_IDS,
    )
    return transformers.Cosmos3EdgeForConditionalGeneration(config)


def merged_by_two(index: int, generator: Generator) -> Image:
    """The same with the number of patches that make a token."""
    inputs, ids = patches_of_any_size(index, generator)
    return inputs | {"image_merge_sizes": torch.tensor([2])}, ids[1:-1]  # which nothing marks


@family(merged_by_two)
def video_llama3() -> nn.Module:
    config = transformers.VideoLlama3Config(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=WIDTHS | {"patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=58,
    )
    return transformers.VideoLlama3ForConditionalGeneration(config)


@family(patches_of_pixels)
def kimi_k25() -> nn.Module:
    attention = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    config = transformers.Kimi_K25Config(
        text_config=TEXT | attention | experts | {"model_type": "deepseek_v3"},
        vision_config=WIDTHS | {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=24,
        **QWEN_IDS,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


def with_ends_inside(index: int, generator: Generator) -> Image:
    """Placeholders that open an image, end its rows and close it are among the others."""
    inputs, _ = patches_of_any_size(index, generator)
    rows, columns = SIZES[index % 3]
    return inputs, [IMAGE] * (rows // 2 * (columns // 2 + 1) + 2)


@family(with_ends_inside, extras=image_types, newlines=(4, 6, 5))
def hunyuan_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}
    config = transformers.HunYuanVLConfig(
        text_config=TEXT | {"head_dim": 8, "rope_parameters": rope},
        vision_config=WIDTHS
        | {"patch_size": 4, "text_hidden_size": 32, "out_hidden_size": 32, "max_image_size": 64},
        image_token_id=IMAGE,
    )
    return transformers.HunYuanVLForConditionalGeneration(config)


def rows_of_patches(index: int, generator: Generator) -> Image:
    """Patches of 4 x 4 in three rows, each with a token behind it."""
    patches = torch.randn(1, 12, 48, generator=generator)
    return {"pixel_values": patches}, [*[*[IMAGE] * 4, 53] * 3]


@family(rows_of_patches)
def fuyu() -> nn.Module:
    config = transformers.FuyuConfig(
        text_config=TEXT | {"model_type": "persimmon"},
        image_size=16,
        patch_size=4,
        image_token_id=IMAGE,
    )
    return transformers.FuyuForCausalLM(config)


@family(squares(16, around=([51], [52])))
def chameleon() -> nn.Module:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    words = {f"IMGIMG{str(code).translate(letters)}Z": 2 + code for code in range(48)}
    config = transformers.ChameleonConfig(
        **TEXT | {"num_key_value_heads": 4},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 48,
            "latent_channels": 4,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map=words | {"<image>": IMAGE},
    )
    return transformers.ChameleonForConditionalGeneration(config)


def patches_as_tokens(index: int, generator: Generator) -> Image:
    """The same where every patch is a token."""
    inputs, _ = patches_with_places(index, generator)
    rows, columns = SIZES[index % 3]
    return inputs, [51, *[IMAGE] * (rows * columns), 52]


@family(patches_as_tokens, extras=image_types)
def gemma4_unified() -> nn.Module:
    text = TEXT | {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = transformers.Gemma4UnifiedConfig(
        text_config=text,
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=58,
        audio_token_id=59,
    )
    return transformers.Gemma4UnifiedForConditionalGeneration(config)


def crops_of_images(index: int, generator: Generator) -> Image:
    """Crops [1,1,3,H,W]."""
    inputs, ids = squares(16)(index, generator)
    return {"pixel_values": inputs["pixel_values"][None]}, ids


@family(crops_of_images)
def perception_lm() -> nn.Module:
    """On CLIP's tower: timm's are not installed everywhere."""
    vision = transformers.CLIPVisionConfig(**CLIP)
    vision.model_args = {"embed_dim": CLIP["hidden_size"]}
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        video_token_id=58,
    )
    return transformers.PerceptionLMForConditionalGeneration(config)


@family(squares(16))
def fast_vlm() -> nn.Module:
    """On a tower of one convolution: timm's are not installed everywhere."""
    config = transformers.FastVlmConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    model = transformers.FastVlmForConditionalGeneration(config)
    model.model.vision_tower = Convolution(3, CLIP["hidden_size"], 8, stride=8)
    return model


class Convolution(nn.Conv2d):
    """A tower of one convolution."""

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=super().forward(pixel_values))
