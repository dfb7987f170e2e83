"""Tiny random-weight decoders whose layers pass on several streams, or get features of the image
between them."""

from __future__ import annotations

import torch
import transformers
from tiny_any_size import GEMMA4_VISION
from tiny_decoders import packed
from tiny_more import Convolution
from tiny_parts import CLIP, IMAGE, PINPOINTS, TEXT, Image, family, squares
from torch import Generator, nn


def packed_of_squares(index: int, generator: Generator) -> Image:
    """Images put together of crops, in which four patches make a token."""
    inputs, ids = packed(index, generator)
    pixels = torch.randn(1, 5, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "image_sizes": 2 * inputs["image_sizes"]}, ids


@family(packed_of_squares, newlines=(8, 8, 8))
def granite4_vision() -> nn.Module:
    qformer = {
        "model_type": "blip_2_qformer",
        "num_hidden_layers": 1,
        "intermediate_size": 40,
        "cross_attention_frequency": 1,
        "use_qformer_text_input": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    wide = {"model_type": "clip_vision_model", "hidden_size": 64, "num_attention_heads": 4}
    config = transformers.Granite4VisionConfig(
        vision_config=CLIP | wide | {"image_size": 64},
        text_config=TEXT | {"attention_multiplier": 0.35, "embedding_multiplier": 2.0},
        qformer_config=qformer,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * rows, 2 * columns] for rows, columns in PINPOINTS],
        downsample_rate="1/2",
        deepstack_layer_map=[(1, 0), (2, 1)],
        spatial_target_layers=[1, 2, 3, 3],
        projector_dropout=0.0,
    )
    return transformers.Granite4VisionForConditionalGeneration(config)


@family(squares(16, around=([51], [52])))
def gemma3n() -> nn.Module:
    """On a tower of one convolution: timm's are not installed everywhere. Of six layers, two of
    which read the keys of others."""
    config = transformers.Gemma3nConfig(
        text_config=TEXT
        | {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 60,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
        },
        audio_config={
            "hidden_size": 16,
            "vocab_size": 4,
            "vocab_offset": 64,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (8, 8),
        },
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        audio_token_id=59,
        boi_token_id=51,
        eoi_token_id=52,
    )
    vision = transformers.CLIPVisionConfig(**CLIP)
    vision.update({"rms_norm_eps": 1e-6, "vocab_size": 4, "vocab_offset": 60})
    vars(config)["vision_config"] = vision  # past the check of its class
    model = transformers.Gemma3nForConditionalGeneration(config)
    model.model.vision_tower = Convolution(3, CLIP["hidden_size"], 8, stride=8)
    return model


def diffusion_gemma() -> nn.Module:
    """Its prompts are those of Gemma 4; it writes blocks of five tokens."""
    text = TEXT | {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_bidirectional_attention": "vision",
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 8,
    }
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=GEMMA4_VISION | {"model_type": "gemma4_vision"},
        image_token_id=IMAGE,
        canvas_length=5,
    )
    return transformers.DiffusionGemmaForBlockDiffusion(config)
