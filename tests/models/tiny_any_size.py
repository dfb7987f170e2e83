"""Tiny random-weight decoders of families whose images may have any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from tiny_parts import (
    IMAGE,
    QWEN_IDS,
    QWEN_TEXT,
    QWEN_VISION,
    TEXT,
    Image,
    Inputs,
    family,
    image_types,
    patches_of_any_size,
)
from torch import Generator, nn

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
ROPE = QWEN_TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0}
GLM_TEXT = QWEN_TEXT | {"rope_parameters": ROPE}
QWEN3_TEXT = QWEN_TEXT | {"head_dim": 8}
VISION = QWEN_VISION | {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40}
WINDOWS = VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
DEEPSTACK = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "num_mel_bins": 8,
    "n_window": 4,
}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 58,
    "image_start_token_id": 51,
    "image_end_token_id": 52,
    "video_start_token_id": 53,
    "video_end_token_id": 54,
}
PIXTRAL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 48,
    "patch_size": 4,
}


def rows_that_end(index: int, generator: Generator) -> Image:
    """An image as Pixtral's processor gives it: a token behind every row says that it ends."""
    rows, columns = ((2, 3), (4, 2), (3, 5))[index % 3]
    size = (rows * 8, columns * 8)
    ids = [token for row in range(rows) for token in (*[IMAGE] * columns, 53 + (row == rows - 1))]
    pixels = torch.randn(1, 3, *size, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}, ids


def made_up(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """Pixels made up with black ones to the largest image."""
    if not images:
        return {}
    sizes = torch.cat([image["image_sizes"] for image in images])
    pixels = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
    for row, (image, (height, width)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        pixels[row, :, :height, :width] = image["pixel_values"][0]
    return {"pixel_values": pixels, "image_sizes": sizes}


any_size = family(patches_of_any_size, extras=image_types)


@any_size
def qwen3_vl_moe() -> nn.Module:
    config = transformers.Qwen3VLMoeConfig(
        text_config=QWEN3_TEXT | EXPERTS, vision_config=DEEPSTACK, **QWEN_IDS
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


@family(patches_of_any_size)
def qwen2_5_omni() -> nn.Module:
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=QWEN_TEXT,
        vision_config=WINDOWS,
        audio_config=AUDIO,
        image_token_index=IMAGE,
        video_token_index=58,
        audio_token_index=59,
        vision_start_token_id=51,
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


@family(patches_of_any_size)
def qwen3_omni() -> nn.Module:
    config = transformers.models.qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
        text_config=QWEN3_TEXT | EXPERTS,
        vision_config=DEEPSTACK,
        audio_config=AUDIO | {"downsample_hidden_size": 8},
        image_token_id=IMAGE,
        video_token_id=58,
        audio_token_id=59,
        vision_start_token_id=51,
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


@any_size
def glm4v() -> nn.Module:
    config = transformers.Glm4vConfig(
        text_config=QWEN_TEXT, vision_config=VISION | {"image_size": 16}, **GLM_IDS
    )
    return transformers.Glm4vForConditionalGeneration(config)


@any_size
def glm46v() -> nn.Module:
    config = transformers.Glm46VConfig(
        text_config=QWEN_TEXT | {"model_type": "glm4v_text"},
        vision_config=VISION | {"image_size": 16, "model_type": "glm4v_vision"},
        **GLM_IDS,
    )
    return transformers.Glm46VForConditionalGeneration(config)


@any_size
def glm4v_moe() -> nn.Module:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Glm4vMoeConfig(
        text_config=GLM_TEXT | experts, vision_config=VISION | {"image_size": 16}, **GLM_IDS
    )
    return transformers.Glm4vMoeForConditionalGeneration(config)


@any_size
def glm_ocr() -> nn.Module:
    config = transformers.GlmOcrConfig(text_config=GLM_TEXT, vision_config=VISION, **GLM_IDS)
    return transformers.GlmOcrForConditionalGeneration(config)


@family(patches_of_any_size)
def exaone4_5() -> nn.Module:
    config = transformers.Exaone4_5_Config(
        text_config=TEXT
        | {"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 4},
        vision_config=WINDOWS | {"num_key_value_heads": 3},
        image_token_id=IMAGE,
        video_token_id=58,
    )
    return transformers.Exaone4_5_ForConditionalGeneration(config)


@family(patches_of_any_size)
def hyperclovax() -> nn.Module:
    config = transformers.HyperCLOVAXVisionV2Config(
        text_config=TEXT | {"model_type": "hyperclovax"},
        vision_config=WINDOWS | {"model_type": "qwen2_5_vl_vision"},
        image_token_id=IMAGE,
        video_token_id=58,
    )
    return transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config)


@family(rows_that_end, join=made_up)
def mistral3() -> nn.Module:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(**PIXTRAL),
        image_token_index=IMAGE,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


@family(rows_that_end, join=made_up)
def lighton_ocr() -> nn.Module:
    config = transformers.LightOnOcrConfig(
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 8},
        vision_config=PIXTRAL | {"model_type": "pixtral"},
        image_token_id=IMAGE,
    )
    return transformers.LightOnOcrForConditionalGeneration(config)


def patches_of_pixels(index: int, generator: Generator) -> Image:
    """The same as patches [P,3,4,4]."""
    inputs, ids = patches_of_any_size(index, generator)
    return inputs | {"pixel_values": inputs["pixel_values"].view(-1, 3, 4, 4)}, ids


@family(patches_of_pixels, extras=image_types)
def paddleocr_vl() -> nn.Module:
    vision = {name: value for name, value in PIXTRAL.items() if name != "image_size"}
    config = transformers.PaddleOCRVLConfig(
        text_config=GLM_TEXT | {"head_dim": 8},
        vision_config=vision | {"image_size": 32},
        **QWEN_IDS,
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config)


ERNIE_ROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}


def experts_by_type(inputs: Inputs) -> Inputs:
    """Which tokens go to the experts of images."""
    types = image_types(inputs)
    return types | {"moe_mm_token_type_ids": types["mm_token_type_ids"]}


@family(patches_of_any_size, extras=experts_by_type)
def ernie4_5_vl() -> nn.Module:
    experts = {
        "moe_intermediate_size": [24, 16],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=QWEN_TEXT | experts | ERNIE_ROPE,
        vision_config=VISION | {"temporal_merge_size": 2},
        **GLM_IDS,
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def patches_with_places(index: int, generator: Generator) -> Image:
    """An image as Gemma 4's processor gives it: patches and their places, made up with none."""
    rows, columns = ((4, 6), (8, 4), (6, 10))[index % 3]
    patches = torch.zeros(1, 64, 3 * 16)
    patches[0, : rows * columns] = torch.rand(rows * columns, 3 * 16, generator=generator)
    places = torch.full((1, 64, 2), -1)
    raster = torch.arange(rows * columns)
    places[0, : rows * columns] = torch.stack([raster % columns, raster // columns], 1)
    ids = [51, *[IMAGE] * (rows * columns // 4), 52]
    return {"pixel_values": patches, "image_position_ids": places}, ids


GEMMA4_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "patch_size": 4,
    "position_embedding_size": 16,
}


@family(patches_with_places, extras=image_types)
def gemma4() -> nn.Module:
    """Of six layers, two of which read the keys of others."""
    config = transformers.Gemma4Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 60,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
        vision_config=GEMMA4_VISION,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=58,
        audio_token_id=59,
    )
    return transformers.Gemma4ForConditionalGeneration(config)
