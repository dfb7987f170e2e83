"""Tiny models with an encoder that has words and image tokens on one axis, and a decoder."""

from __future__ import annotations

import torch
import transformers
from tiny_cross import LAYOUT, Cross, Sample, words
from tiny_parts import IMAGE, PAD, SIGLIP, TEXT, VOCABULARY, Inputs
from tiny_writers import DECODER
from torch import nn

FAMILIES: dict[str, Cross] = {}
"""They go through the tests of decoders' encoders, `test_encoder_decoder.py`."""


def collate(samples: list[Sample]) -> Inputs:
    """Words and images for the encoder, and the decoder's first tokens."""
    inputs = words(samples, "right")
    images = [image for _, images in samples for image in images]
    if images:
        inputs["pixel_values"] = torch.stack(images)
    begun = torch.tensor([[1, 5, 7]]).expand(len(samples), -1)
    return inputs | {"decoder_input_ids": begun}


def florence2() -> nn.Module:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [12, 24],
        "num_heads": [2, 3],
        "num_groups": [2, 3],
        "window_size": 4,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    text = DECODER | {
        "model_type": "bart",
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "dropout": 0.0,
    }
    config = transformers.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE
    )
    return transformers.Florence2ForConditionalGeneration(config)


def t5gemma2() -> nn.Module:
    text = {name: value for name, value in TEXT.items() if name != "tie_word_embeddings"} | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = transformers.T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": SIGLIP | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "boi_token_index": 51,
            "eoi_token_index": 52,
            "image_token_index": IMAGE,
        },
        decoder=text,
        image_token_index=IMAGE,
        eoi_token_index=52,
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        dropout_rate=0.0,
    )
    return transformers.T5Gemma2ForConditionalGeneration(config)


FAMILIES["florence2"] = Cross(florence2, collate, placeholders=17, layout=LAYOUT)
FAMILIES["t5gemma2"] = Cross(t5gemma2, collate, placeholders=4, layout=LAYOUT)
