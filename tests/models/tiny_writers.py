"""Tiny models whose encoder sees the image, and whose decoder writes."""

from __future__ import annotations

import torch
import transformers
from tiny_cross import Sample, family, words
from tiny_parts import CLIP, PAD, SIDES, TEXT, VOCABULARY, Inputs
from tiny_resamplers import one_image_each
from torch import nn

VISION = {name: CLIP[name] for name in SIDES}
SAME_LENGTH = (("i", 5), ("i", 5))
"""Their positions are absolute, so that padding on the left would move the words."""
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


@family(one_image_each, placeholders=0, layout=SAME_LENGTH)
def blip() -> nn.Module:
    text = BERT | {"hidden_size": 24, "encoder_hidden_size": 24, "sep_token_id": VOCABULARY}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    return transformers.BlipForConditionalGeneration(config)


def started(samples: list[Sample]) -> Inputs:
    """Images, and the beginnings of what is written about them."""
    inputs = one_image_each(samples)
    return {"pixel_values": inputs["pixel_values"], "decoder_input_ids": inputs["input_ids"]}


def pair(encoder, decoder) -> nn.Module:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, PAD
    return transformers.VisionEncoderDecoderModel(config)


@family(started, placeholders=0, layout=SAME_LENGTH)
def trocr() -> nn.Module:
    return pair(transformers.DeiTConfig(**VISION), transformers.TrOCRConfig(**DECODER))


@family(started, placeholders=0, layout=SAME_LENGTH, side=64)
def donut() -> nn.Module:
    swin = transformers.DonutSwinConfig(
        image_size=64, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=4
    )
    return pair(swin, transformers.MBartConfig(**DECODER, is_decoder=True))


def flattened(samples: list[Sample]) -> Inputs:
    """Patches of 8 x 8 with their row and column; images of fewer rows have padding behind
    them."""
    inputs = started(samples)
    pixels = inputs.pop("pixel_values")
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
    rows, columns = torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij")
    places = torch.stack([rows, columns], -1).expand(len(pixels), -1, -1, -1)
    patches = torch.cat([places, patches], -1).flatten(1, 2)
    mask = torch.ones(patches.shape[:2])
    for row, (ids, _) in enumerate(samples):
        mask[row, 16 - 4 * (ids[1] % 3) :] = 0
    return inputs | {"flattened_patches": patches * mask[..., None], "attention_mask": mask}


@family(flattened, placeholders=0, layout=SAME_LENGTH)
def pix2struct() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "patch_embed_hidden_size": 192,
        "d_ff": 40,
        "d_kv": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "seq_len": 16,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 3,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "decoder_start_token_id": 1,
    }
    config = transformers.Pix2StructConfig(vision_config=vision, text_config=text)
    return transformers.Pix2StructForConditionalGeneration(config)


@family(started, placeholders=0, layout=SAME_LENGTH, side=64)
def pp_formulanet() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "mlp_dim": 40,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 20,
        "post_conv_out_channels": 24,
        "decoder_hidden_size": 32,
    }
    config = transformers.PPFormulaNetConfig(vision_config=vision, text_config=DECODER)
    return transformers.PPFormulaNetForConditionalGeneration(config)


def before_the_words(samples: list[Sample]) -> Inputs:
    """As many images in every sample, and which of them every word looks at."""
    inputs = words(samples)
    most = max(1, max(len(images) for _, images in samples))
    pixels = torch.zeros(len(samples), most, 3, 32, 32)
    mask = torch.zeros(*inputs["input_ids"].shape, most, dtype=torch.long)
    for row, (_, images) in enumerate(samples):
        for index, image in enumerate(images):
            pixels[row, index] = image
            mask[row, :, index] = 1
    return inputs | {"pixel_values": pixels, "image_attention_mask": mask}


@family(before_the_words, layout=((4, "i", 6), (2, "i", 3, "i", 2)))
def idefics() -> nn.Module:
    config = transformers.IdeficsConfig(
        **{name: value for name, value in TEXT.items() if name != "num_key_value_heads"},
        additional_vocab_size=0,
        cross_layer_interval=2,
        use_resampler=True,
        alpha_initializer="ones",
        vision_config={
            "embed_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": 32,
            "patch_size": 8,
        },
        perceiver_config={
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 8,
        },
    )
    return transformers.IdeficsForVisionText2Text(config)
