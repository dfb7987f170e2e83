"""Tiny random-weight decoders of families whose images are squares of one size, or made of them."""

from __future__ import annotations

import torch
import transformers
from tiny_decoders import packed
from tiny_parts import (
    CLIP,
    IMAGE,
    PINPOINTS,
    SIDES,
    SIGLIP,
    TEXT,
    Image,
    family,
    squares,
)
from torch import Generator, nn

PLAIN = {name: SIGLIP[name] for name in SIDES}
LLAMA = TEXT | {"model_type": "llama"}
COHERE = TEXT | {"model_type": "cohere2", "sliding_window": 16, "sliding_window_pattern": 2}


def between(tokens: int, before: tuple, between: tuple, behind: tuple, last: tuple | None = None):
    """Images of one crop or three, `tokens` placeholders each, with these ids around and between
    them, and others before the last one."""

    def image(index: int, generator: Generator) -> Image:
        crops = (1, 3)[index % 2]
        ids = [*before]
        for crop in range(crops):
            first, final = crop == 0, crop == crops - 1
            ids += () if first else last if final and last is not None else between
            ids += [IMAGE] * tokens
        pixels = torch.randn(crops, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels}, [*ids, *behind]

    return image


@family(squares(16))
def vipllava() -> nn.Module:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=[-2, -3],
    )
    return transformers.VipLlavaForConditionalGeneration(config)


@family(squares(16))
def video_llava() -> nn.Module:
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=58,
        image_seq_length=16,
    )
    return transformers.VideoLlavaForConditionalGeneration(config)


@family(packed, newlines=(8, 8, 8))
def llava_next_video() -> nn.Module:
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=58,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


@family(between(4, (50, 51), (52,), (53,), last=(51,)))
def aya_vision() -> nn.Module:
    config = transformers.AyaVisionConfig(
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
        text_config=COHERE,
        image_token_index=IMAGE,
        alignment_intermediate_size=24,
    )
    return transformers.AyaVisionForConditionalGeneration(config)


@family(between(4, (50,), (51,), (51, 52)))
def cohere2_vision() -> nn.Module:
    config = transformers.Cohere2VisionConfig(
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
        text_config=COHERE,
        image_token_id=IMAGE,
        alignment_intermediate_size=24,
    )
    return transformers.Cohere2VisionForConditionalGeneration(config)


@family(squares(16))
def deepseek_vl() -> nn.Module:
    config = transformers.DeepseekVLConfig(
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
        text_config=LLAMA,
        image_token_id=IMAGE,
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


def in_two_sizes(index: int, generator: Generator) -> Image:
    """The same image small and large."""
    inputs, ids = squares(16)(index, generator)
    large = torch.randn(1, 3, 256, 256, generator=generator)
    return inputs | {"high_res_pixel_values": large}, ids


@family(in_two_sizes)
def deepseek_vl_hybrid() -> nn.Module:
    config = transformers.DeepseekVLHybridConfig(
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"},
        high_res_vision_config=SAM | {"model_type": "sam_vision_model"},
        text_config=LLAMA,
        image_token_id=IMAGE,
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config)


@family(squares(16, around=([51], [52])))
def janus() -> nn.Module:
    config = transformers.JanusConfig(
        vision_config=PLAIN | {"projection_dim": 32, "mlp_ratio": 2.0, "num_image_tokens": 16},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        text_config=LLAMA,
        image_token_id=IMAGE,
    )
    return transformers.JanusForConditionalGeneration(config)


SAM = {
    "hidden_size": 24,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_dim": 40,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
}


@family(squares(16, (1, 2), 64, around=([51], [52])))
def got_ocr2() -> nn.Module:
    config = transformers.GotOcr2Config(
        vision_config=SAM | {"image_size": 64, "patch_size": 4},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return transformers.GotOcr2ForConditionalGeneration(config)


@family(squares(6, (1, 2), around=([51], [52])))
def aria() -> nn.Module:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = transformers.AriaConfig(
        vision_config=PLAIN | {"model_type": "idefics3_vision"},
        text_config=TEXT | experts | {"model_type": "aria_text"},
        projector_patch_to_query_dict={16: 6},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.AriaForConditionalGeneration(config)


@family(squares(9, (1, 3), 48, ([51], [52])))
def qianfan_ocr() -> nn.Module:
    vision = PLAIN | {"image_size": [48, 48], "patch_size": [8, 8]}
    config = transformers.QianfanOCRConfig(
        vision_config=vision,
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 8},
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return transformers.QianfanOCRForConditionalGeneration(config)


@family(between(4, (50,), (52,), (54,)))
def ovis2() -> nn.Module:
    config = transformers.Ovis2Config(
        vision_config=PLAIN | {"hidden_stride": 2, "vocab_size": 20},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[50, 51, 52, 53, 54],
        vocab_size=60,
        hidden_size=32,
    )
    return transformers.Ovis2ForConditionalGeneration(config)


@family(between(4, (50, 51), (52,), (53,), last=(52, 51)))
def llama4() -> nn.Module:
    config = transformers.Llama4Config(
        vision_config=PLAIN
        | {
            "intermediate_size": 96,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=TEXT
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 64,
        },
        image_token_index=IMAGE,
    )
    model = transformers.Llama4ForConditionalGeneration(config)
    model.language_model.register_forward_hook(_without_images)
    return model


def _without_images(_: nn.Module, args: tuple, output) -> None:
    # Llama 4 of transformers 5.24 reads this of its language model, which does not give it.
    output.image_outputs = None
