"""Tiny random-weight decoders that are tested with every reducer and in every kind of call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from tiny_parts import (
    CLIP,
    GEMMA3_LAYERS,
    IMAGE,
    PINPOINTS,
    QWEN_IDS,
    QWEN_TEXT,
    QWEN_VISION,
    SIDES,
    SIGLIP,
    TEXT,
    Image,
    Inputs,
    family,
    image_types,
    patches_of_any_size,
    squares,
)
from torch import Generator, Tensor, nn


def packed(index: int, generator: Generator, most: float | None = None) -> Image:
    """An image that is higher than wide, one that fills both ways or one that is cut at the
    sides; where it has more than `most` times the tokens of a crop, it is made smaller."""
    size, crops, rows = (
        ((60, 30), 2, (8, 4)),
        ((64, 64), 4, (8, 8)),
        ((64, 40), 4, (8, 6)),
    )[index % 3]
    if most is not None and crops == 4:
        ratio = (rows[0] * rows[1] / (most * 16)) ** 0.5
        rows = tuple(int(side // ratio) for side in rows) if ratio > 1.1 else rows
    pixels = torch.randn(1 + crops, 3, 32, 32, generator=generator)
    stacked = torch.cat([pixels, torch.zeros(4 - crops, 3, 32, 32)])
    inputs = {"pixel_values": stacked[None], "image_sizes": torch.tensor([size])}
    return inputs, [IMAGE] * (16 + rows[0] * (rows[1] + 1))


def packed_within(index: int, generator: Generator) -> Image:
    """The same with a bound."""
    return packed(index, generator, most=2)


def labelled(index: int, generator: Generator) -> Image:
    """Crops with tokens before each that say which; the last one is the whole image."""
    crops = (1, 3)[index % 2]
    ids = [token for crop in range(crops - 1) for token in (50, 51 + crop, *[IMAGE] * 4)]
    pixels = torch.randn(crops, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels}, [*ids, 50, 55, *[IMAGE] * 4, 50]


def by_sample(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The crops of every sample [B,crops,3,H,W], made up with black ones."""
    crops = [image["pixel_values"] for image in images]
    if not crops:
        return {}
    none = torch.zeros(0, *crops[0].shape[1:])
    rows: list[Tensor] = [
        torch.cat([none, *(crop for crop, at in zip(crops, owner, strict=True) if at == sample)])
        for sample in range(samples)
    ]
    return {"pixel_values": nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def no_types(inputs: Inputs) -> Inputs:
    """All tokens of one type."""
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def types(inputs: Inputs) -> Inputs:
    """Those of an image of another."""
    return {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


@family(squares(16))
def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config)


@family(packed, newlines=(8, 8, 8))
def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


@family(packed_within, newlines=(8, 5, 6))
def llava_onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=58,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


@family(squares(9, (1, 3), 48, ([51], [52])))
def internvl() -> nn.Module:
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **(vision | {"image_size": [48, 48], "patch_size": [8, 8]})
        ),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return transformers.InternVLForConditionalGeneration(config)


@family(labelled, join=by_sample)
def smolvlm() -> nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config=transformers.models.smolvlm.SmolVLMVisionConfig(
            **{k: SIGLIP[k] for k in SIDES}
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


@family(labelled, join=by_sample)
def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config=transformers.models.idefics3.Idefics3VisionConfig(
            **{k: SIGLIP[k] for k in SIDES}
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


@family(squares(16), extras=no_types)
def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP, projection_dim=32),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


@family(squares(4, around=([51], [52])), extras=types)
def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        text_config=transformers.Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=GEMMA3_LAYERS,
        ),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@family(patches_of_any_size, extras=image_types)
def qwen2_vl() -> nn.Module:
    vision = QWEN_VISION | {"embed_dim": 24, "hidden_size": 32}
    config = transformers.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


@family(patches_of_any_size, extras=image_types)
def qwen2_5_vl() -> nn.Module:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@family(patches_of_any_size, extras=image_types)
def qwen3_vl() -> nn.Module:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(
        text_config=QWEN_TEXT | {"head_dim": 8}, vision_config=vision, **QWEN_IDS
    )
    return transformers.Qwen3VLForConditionalGeneration(config)
