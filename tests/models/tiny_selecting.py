"""Tiny random-weight decoders whose attention chooses keys by an index, and Inkling's, whose
attention has short convolutions around it: tokens leave before the language model alone."""

from __future__ import annotations

import torch
import transformers
from tiny_any_size import GLM_IDS, PIXTRAL, VISION, any_size, made_up, rows_that_end
from tiny_hybrids import DELTA, QWEN_TOWER, SHARED_EXPERT, SIZES
from tiny_more import WIDTHS
from tiny_parts import (
    IMAGE,
    QWEN_IDS,
    TEXT,
    Image,
    family,
    image_types,
    patches_of_any_size,
)
from torch import Generator, nn

INDEX = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}
"""Of so many heads that no two keys have the same score, which would be chosen by chance."""
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}


@any_size
def glm5_next() -> nn.Module:
    text = TEXT | LATENT | INDEX | ROUTED
    config = transformers.Glm5NextConfig(
        text_config=text
        | {
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "hc_mult": 2,
            "index_kpool": 2,
        },
        vision_config=VISION | {"image_size": 16, "projection_intermediate_size": 40},
        **GLM_IDS,
    )
    return transformers.Glm5NextForConditionalGeneration(config)


@any_size
def qwen4_exp() -> nn.Module:
    layer_types = ["linear_attention", "linear_attention", "indexed_attention", "linear_attention"]
    text = TEXT | DELTA | SHARED_EXPERT | {"layer_types": layer_types, "eos_token_id": 3}
    config = transformers.Qwen4ExpConfig(
        text_config=text
        | {
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ple_embed_dim": 8,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 50,
            "split_ngram_parts": 1,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        vision_config=QWEN_TOWER,
        **QWEN_IDS,
    )
    return transformers.Qwen4ExpForConditionalGeneration(config)


@family(patches_of_any_size)
def dots3_note() -> nn.Module:
    config = transformers.Dots3NoteConfig(
        text_config=TEXT
        | LATENT
        | INDEX
        | ROUTED
        | {
            "head_dim": 8,
            "shared_experts_intermediate_size": 24,
            "sliding_window": 16,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 8,
            "swa_kv_lora_rank": 8,
            "swa_head_dim": 8,
            "swa_qk_nope_head_dim": 4,
            "swa_v_head_dim": 8,
        },
        vision_config=WIDTHS
        | {
            "patch_size": 4,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "adapter_in_dim": 24,
            "adapter_out_dim": 32,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
        image_token_id=IMAGE,
        video_token_id=58,
        audio_token_id=59,
    )
    return transformers.Dots3NoteForConditionalGeneration(config)


def with_rows_inside(index: int, generator: Generator) -> Image:
    """Placeholders that end the rows of an image are among the others."""
    inputs, _ = patches_of_any_size(index, generator)
    rows, columns = SIZES[index % 3]
    return inputs, [51, *[IMAGE] * (rows // 2 * (columns // 2 + 1)), 52]


@family(with_rows_inside, extras=image_types, newlines=(2, 4, 3))
def hy_v4_vl() -> nn.Module:
    config = transformers.HYV4VLConfig(
        text_config=TEXT
        | LATENT
        | INDEX
        | ROUTED
        | {
            "hc_mult": 2,
            "indexer_types": ["full", "shared", "full", "shared"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
            },
        },
        vision_config=WIDTHS | {"patch_size": 4, "out_hidden_size": 32, "max_image_size": 64},
        image_token_id=IMAGE,
        video_token_id=58,
    )
    return transformers.HYV4VLForConditionalGeneration(config)


@family(patches_of_any_size)
def minimax_m3() -> nn.Module:
    config = transformers.MiniMaxM3VLConfig(
        text_config=TEXT
        | {
            "head_dim": 8,
            "rotary_dim": 8,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3],
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        vision_config=WIDTHS | {"patch_size": 4, "temporal_patch_size": 1, "image_size": 32},
        image_token_index=IMAGE,
        video_token_index=58,
        projector_hidden_size=24,
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


@family(rows_that_end, join=made_up)
def mistral_large4() -> nn.Module:
    config = transformers.MistralLarge4Config(
        text_config=TEXT
        | {name: value for name, value in LATENT.items() if name != "q_lora_rank"}
        | INDEX
        | ROUTED
        | {"indexer_types": ["full", "shared", "full", "shared"]},
        vision_config=PIXTRAL | {"model_type": "pixtral"},
        image_token_index=IMAGE,
    )
    return transformers.MistralLarge4ForConditionalGeneration(config)


def patches_alone(index: int, generator: Generator) -> Image:
    """Patches of 4 x 4 one by one, each a token."""
    rows, columns = ((3, 4), (2, 5), (4, 4))[index % 3]
    pixels = torch.randn(rows * columns, 2, 4, 4, 3, generator=generator)
    return {"pixel_values": pixels}, [51, *[IMAGE] * (rows * columns)]


INKLING_TEXT = TEXT | {
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 64,
    "conv_kernel_size": 3,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


@family(patches_alone)
def inkling() -> nn.Module:
    config = transformers.InklingConfig(
        text_config=INKLING_TEXT
        | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "n_shared_experts": 1},
        vision_config={
            "patch_size": 4,
            "temporal_patch_size": 2,
            "hidden_size": 24,
            "num_hidden_layers": 3,
        },
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=59,
    )
    return transformers.InklingForConditionalGeneration(config)


def blocks_of_patches(index: int, generator: Generator) -> Image:
    """Blocks of 2 x 2 patches of 4 x 4, each a token."""
    rows, columns = ((2, 3), (4, 2), (3, 5))[index % 3]
    pixels = torch.randn(rows * columns, 8, 8, 3, generator=generator)
    grid = torch.tensor([[1, rows, columns]])
    ids = [51, *[IMAGE] * (rows * columns)]
    return {"pixel_values": pixels, "image_grid_thw": grid}, ids


INKLING2_TEXT = INKLING_TEXT | {"unpadded_vocab_size": 60, "n_layers_per_attn_res_block": 2}
INKLING2_VISION = WIDTHS | {
    "patch_size": 4,
    "posemb_grid_size": 4,
    "projection_hidden_dim": 24,
    "text_hidden_size": 32,
}


@family(blocks_of_patches)
def inkling2() -> nn.Module:
    config = transformers.Inkling2Config(
        text_config=INKLING2_TEXT, vision_config=INKLING2_VISION, image_token_id=IMAGE
    )
    return transformers.Inkling2ForConditionalGeneration(config)


@family(blocks_of_patches)
def inkling2_loop() -> nn.Module:
    config = transformers.Inkling2LoopConfig(
        text_config=INKLING2_TEXT
        | {
            "num_hidden_layers": 6,
            "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_num_passes": 2,
            "loop_gate_rank": 4,
        },
        vision_config=INKLING2_VISION | {"model_type": "inkling2_vision"},
        image_token_id=IMAGE,
    )
    return transformers.Inkling2LoopForConditionalGeneration(config)
