"""Tiny random-weight decoders whose language models keep states or choose keys by an index: tokens
leave before them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from tiny_any_size import EXPERTS, VISION, any_size
from tiny_parts import (
    IMAGE,
    QWEN_IDS,
    QWEN_TEXT,
    SIGLIP,
    TEXT,
    Image,
    Inputs,
    family,
    image_types,
    patches_of_any_size,
)
from torch import Generator, nn

DELTA = {
    "rms_norm_eps": 1e-2,  # what the rule gives may be small: a norm would blow rounding up
    "head_dim": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": QWEN_TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0},
}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 24}
QWEN_TOWER = VISION | {"num_position_embeddings": 16}
SIZES = ((4, 6), (8, 4), (6, 10))
"""Rows and columns of patches of every image."""


@any_size
def qwen3_5() -> nn.Module:
    config = transformers.Qwen3_5Config(
        text_config=TEXT | DELTA, vision_config=QWEN_TOWER, **QWEN_IDS
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


@any_size
def qwen3_5_moe() -> nn.Module:
    config = transformers.Qwen3_5MoeConfig(
        text_config=TEXT | DELTA | SHARED_EXPERT, vision_config=QWEN_TOWER, **QWEN_IDS
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def rows_with_padding(index: int, generator: Generator) -> Image:
    """Patches of 4 x 4 in rows, made up to the largest image, four of them to a token."""
    rows, columns = SIZES[index % 3]
    patches, mask = torch.zeros(1, 60, 48), torch.zeros(1, 60, dtype=torch.int64)
    patches[0, : rows * columns] = torch.randn(rows * columns, 48, generator=generator)
    mask[0, : rows * columns] = 1
    return {
        "pixel_values": patches,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }, [51, *[IMAGE] * (rows * columns // 4), 52]


@family(rows_with_padding)
def lfm2_vl() -> nn.Module:
    vision = {name: value for name, value in SIGLIP.items() if name != "image_size"}
    config = transformers.Lfm2VlConfig(
        text_config=TEXT
        | {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "conv"]},
        vision_config=vision
        | {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16},
        image_token_id=IMAGE,
        projector_hidden_size=24,
        tie_word_embeddings=False,
    )
    return transformers.Lfm2VlForConditionalGeneration(config)


@family(patches_of_any_size)
def lfm3_vl() -> nn.Module:
    layer_types = ["conv", "full_attention", "sliding_attention", "conv"]
    config = transformers.Lfm3VlConfig(
        text_config=TEXT
        | {"model_type": "lfm3", "head_dim": 8, "layer_types": layer_types, "conv_L_cache": 3},
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "patch_size": 4,
            "temporal_patch_size": 1,
        },
        projector_hidden_size=24,
        tie_word_embeddings=False,
        **QWEN_IDS,
    )
    return transformers.Lfm3VlForConditionalGeneration(config)


def strip(index: int, generator: Generator) -> Image:
    """Patches of 4 x 4 side by side, sixteen of them to a token."""
    rows, columns = ((8, 12), (16, 8), (12, 8))[index % 3]
    pixels = torch.randn(1, 3, 4, 4 * rows * columns, generator=generator)
    ids = [51, *[IMAGE] * (rows * columns // 16), 52]
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]])}, ids


def one_strip(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The patches of all images side by side."""
    if not images:
        return {}
    return {
        "pixel_values": torch.cat([image["pixel_values"] for image in images], 3),
        "target_sizes": torch.cat([image["target_sizes"] for image in images]),
    }


STRIPS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}
MINICPM = {
    "text_config": TEXT | DELTA | {"model_type": "qwen3_5_text"},
    "vision_config": STRIPS,
    "insert_layer_id": 0,
    "image_token_id": IMAGE,
    "video_token_id": 58,
    "tie_word_embeddings": False,
}


@family(strip, join=one_strip)
def minicpm_v4_6() -> nn.Module:
    config = transformers.MiniCPMV4_6Config(**MINICPM)
    return transformers.MiniCPMV4_6ForConditionalGeneration(config)


@family(strip, join=one_strip, extras=image_types)
def minicpm_v4_7() -> nn.Module:
    ids = {"image_start_id": 51, "image_end_id": 52, "slice_start_id": 53, "slice_end_id": 54}
    config = transformers.MiniCPMV4_7Config(**MINICPM, **ids, newline_id=55)
    return transformers.MiniCPMV4_7ForConditionalGeneration(config)


def fine_strip(index: int, generator: Generator) -> Image:
    """The same, four patches to a token."""
    rows, columns = SIZES[index % 3]
    pixels = torch.randn(1, 3, 4, 4 * rows * columns, generator=generator)
    ids = [51, *[IMAGE] * (rows * columns // 4), 52]
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]])}, ids


@family(fine_strip, join=one_strip)
def minicpm_ocr() -> nn.Module:
    config = transformers.MiniCPMOcrConfig(**MINICPM)
    return transformers.MiniCPMOcrForConditionalGeneration(config)


def patches_and_grid(index: int, generator: Generator) -> Image:
    """Patches of 4 x 4 in rows, four of them to a token."""
    rows, columns = SIZES[index % 3]
    patches = torch.randn(rows * columns, 48, generator=generator)
    ids = [51, *[IMAGE] * (rows * columns // 4), 52]
    return {"pixel_values": patches, "image_grid_hw": torch.tensor([[rows, columns]])}, ids


@family(patches_and_grid)
def nemotron_omni() -> nn.Module:
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text
        | {
            "model_type": "nemotron_h",
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
            "head_dim": 8,
            "ssm_state_size": 6,
            "time_step_min": 1e-6,  # only a prompt is held to it, in transformers 5.24
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        vision_config={
            "model_type": "radio",
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "patch_size": 4,
            "image_size": 32,
            "max_img_size": 64,
            "num_cls_tokens": 1,
            "num_registers": 1,
            "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
        vision_hidden_size=24,
        projector_hidden_size=24,
        image_token_id=IMAGE,
        video_token_id=58,
        audio_token_id=59,
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config)
