"""Tiny models whose images are resampled into a few queries before a language model gets them."""

from __future__ import annotations

import torch
import transformers
from tiny_cross import Sample, family, words
from tiny_parts import CLIP, IMAGE, PAD, SIDES, TEXT, VOCABULARY, Inputs
from torch import nn

ONE_EACH = ((4, "i", 6), (2, "i", 3))
QUERIES = 5
VISION = {name: CLIP[name] for name in SIDES}
QFORMER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "cross_attention_frequency": 1,
    "encoder_hidden_size": 24,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def one_image_each(samples: list[Sample]) -> Inputs:
    """A batch in which every sample has an image."""
    return words(samples) | {"pixel_values": torch.stack([image for _, (image,) in samples])}


@family(one_image_each, placeholders=QUERIES, layout=ONE_EACH)
def blip2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=OPT,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def with_instruction(samples: list[Sample]) -> Inputs:
    """The same, and the words once more for the Q-former."""
    instruction = words(samples, "right")
    return one_image_each(samples) | {
        "qformer_input_ids": instruction["input_ids"],
        "qformer_attention_mask": instruction["attention_mask"],
    }


@family(with_instruction, placeholders=QUERIES, layout=ONE_EACH)
def instructblip() -> nn.Module:
    config = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=TEXT | {"model_type": "llama"},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


def in_frames(samples: list[Sample]) -> Inputs:
    """The same with two frames of a video."""
    inputs = with_instruction(samples)
    frames = inputs["pixel_values"]
    return inputs | {"pixel_values": torch.stack([frames, frames.roll(3, -1)], 1)}


@family(in_frames, placeholders=2 * QUERIES, layout=ONE_EACH)
def instructblipvideo() -> nn.Module:
    config = transformers.InstructBlipVideoConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=TEXT | {"model_type": "llama"},
        num_query_tokens=QUERIES,
        video_token_index=IMAGE,
    )
    return transformers.InstructBlipVideoForConditionalGeneration(config)


def padded_patches(samples: list[Sample]) -> Inputs:
    """Images of several sizes, padded, and as many of them in every sample."""
    inputs = words(samples)
    most = max(1, max(len(images) for _, images in samples))
    pixels = torch.zeros(len(samples), most, 3, 32, 32)
    mask = torch.zeros(len(samples), most, 32, 32, dtype=torch.bool)
    for row, (ids, images) in enumerate(samples):
        for index, image in enumerate(images):
            height, width = ((32, 32), (24, 16), (16, 32))[(len(ids) + index) % 3]
            pixels[row, index, :, :height, :width] = image[:, :height, :width]
            mask[row, index, :height, :width] = True
    return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}


@family(padded_patches, placeholders=QUERIES)
def idefics2() -> nn.Module:
    config = transformers.Idefics2Config(
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": QUERIES,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=TEXT | {"model_type": "mistral"},
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def with_positions(samples: list[Sample]) -> Inputs:
    """Where the queries of the image go."""
    inputs = one_image_each(samples)
    return inputs | {"image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}


KOSMOS_TEXT = {
    "vocab_size": VOCABULARY,
    "embed_dim": 32,
    "layers": 2,
    "ffn_dim": 48,
    "attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "dropout": 0.0,
}


@family(with_positions, placeholders=QUERIES, layout=ONE_EACH)
def kosmos2() -> nn.Module:
    config = transformers.Kosmos2Config(
        vision_config=VISION, text_config=KOSMOS_TEXT, latent_query_num=QUERIES
    )
    return transformers.Kosmos2ForConditionalGeneration(config)


def flattened(samples: list[Sample]) -> Inputs:
    """Patches of 8 x 8 with their row and column, counted from 1; all but the first image have
    fewer, and padding behind them."""
    inputs = with_positions(samples)
    pixels = inputs.pop("pixel_values")
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
    rows, columns = torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij")
    places = torch.stack([rows, columns], -1).expand(len(pixels), -1, -1, -1)
    patches = torch.cat([places, patches], -1).flatten(1, 2)
    for row, (ids, _) in enumerate(samples):
        patches[row, 16 - len(ids) % 5 :] = 0
    return inputs | {"flattened_patches": patches}


FLATTENED_VISION = {
    "hidden_size": 24,
    "patch_embed_hidden_size": 192,
    "intermediate_size": 40,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_num_patches": 16,
}


@family(flattened, placeholders=QUERIES, layout=ONE_EACH)
def kosmos2_5() -> nn.Module:
    config = transformers.Kosmos2_5Config(
        vision_config=FLATTENED_VISION, text_config=KOSMOS_TEXT, latent_query_num=QUERIES
    )
    return transformers.Kosmos2_5ForConditionalGeneration(config)
