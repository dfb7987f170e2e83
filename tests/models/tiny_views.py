"""Tiny random-weight decoders of families whose images have structure inside them: ends of rows,
views, words of a visual vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from tiny_any_size import PIXTRAL, made_up, rows_that_end
from tiny_more import WIDTHS
from tiny_parts import (
    IMAGE,
    TEXT,
    Image,
    Inputs,
    family,
    image_types,
    patches_of_any_size,
)
from torch import Generator, nn

SIZES = ((2, 3), (4, 2), (3, 5))
"""Rows and columns of tokens of every image."""


@family(rows_that_end, join=made_up)
def pixtral() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**PIXTRAL | {"patch_size": 8}),
        text_config=transformers.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


MUSE_VISION = WIDTHS | {
    "patch_size": 4,
    "patch_temporal": 1,
    "pos_emb_height": 2,
    "pos_emb_width": 2,
    "layer_types": ["full_attention", "full_attention", "window_attention"],
}
MUSE_TEXT = TEXT | {"head_dim": 8, "sliding_window": 16, "qk_scale_factor": 2.0}
MUSE = {
    "image_token_id": IMAGE,
    "video_token_id": 58,
    "out_hidden_size": 96,
    "projector_hidden_size": 24,
}


@family(patches_of_any_size)
def muse_glimmer() -> nn.Module:
    config = transformers.MuseGlimmerConfig(
        text_config=MUSE_TEXT, vision_config=MUSE_VISION, **MUSE
    )
    return transformers.MuseGlimmerForConditionalGeneration(config)


@family(patches_of_any_size)
def muse_spark() -> nn.Module:
    experts = {
        "moe_intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 24,
    }
    config = transformers.MuseSparkConfig(
        text_config=MUSE_TEXT | experts,
        vision_config=MUSE_VISION,
        audio_config={
            "patch_sizes": [4],
            "hidden_sizes": [8],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
        audio_token_id=59,
        **MUSE,
    )
    return transformers.MuseSparkForConditionalGeneration(config)


def words(index: int, generator: Generator) -> tuple[dict, int, int]:
    """Pixels of an image of which 8 x 8 become a word."""
    rows, columns = SIZES[index % 3]
    pixels = torch.randn(1, 3, rows * 8, columns * 8, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[rows * 8, columns * 8]])}
    return inputs, rows, columns


def words_with_ends(index: int, generator: Generator) -> Image:
    """Placeholders that end rows are among the others; all images of a size, as the stock model
    gives others in a batch."""
    inputs, rows, columns = words(0, generator)
    return inputs, [21, 20, 53, *[IMAGE] * (rows * (columns + 1)), 54, 52]


@family(words_with_ends, newlines=(2, 2, 2))
def emu3() -> nn.Module:
    names = {f"<|visual token {code:06d}|>": 2 + code for code in range(40)}
    config = transformers.Emu3Config(
        text_config=TEXT,
        vq_config={
            "codebook_size": 40,
            "embed_dim": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map=names | {"<|extra_200|>": 50, "<image>": IMAGE},
    )
    return transformers.Emu3ForConditionalGeneration(config)


def words_in_rows(index: int, generator: Generator) -> Image:
    """Tokens of the prompt end every row but the last."""
    inputs, rows, columns = words(index, generator)
    row = [*[IMAGE] * columns, 54]
    return inputs, [21, 20, 53, *(row * rows)[:-1], 52]


@family(words_in_rows, join=made_up)
def apertus() -> nn.Module:
    config = transformers.Apertus1p5Config(
        text_config=TEXT
        | {
            "vocab_size": 120,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "codebook_size": 40,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "resolution": 32,
        },
        audio_config={"model_type": "wavtokenizer_encoder", "codebook_size": 10},
        image_token_id=IMAGE,
        audio_token_id=59,
        image_token_offset=60,
        audio_token_offset=100,
    )
    return transformers.Apertus1p5ForConditionalGeneration(config)


def whole_and_crops(tokens: tuple[int, int], side: int, separators: int = 0, around=None):
    """Images of so many tokens for the whole, and for each of none, two or three crops, with ids
    around them."""
    before, behind, newline = around or ([], [], [])

    def image(index: int, generator: Generator) -> Image:
        count = (0, 2, 3)[index % 3]
        inputs = {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}
        ids = []
        for crop in range(count):
            ids += [*before, *[IMAGE] * tokens[1], *behind, *(newline if crop else ())]
        if count:
            half = side // 2
            inputs["pixel_values_local"] = torch.randn(count, 3, half, half, generator=generator)
        inputs["num_local_patches"] = torch.tensor([count])
        return inputs, [*ids, *before, *[IMAGE] * (tokens[0] + separators), *behind]

    return image


def joined_views(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The inputs of all images, of which some have no crops."""
    names = {name for image in images for name in image}
    return {name: torch.cat([image[name] for image in images if name in image]) for name in names}


@family(whole_and_crops((16, 4), 64, around=([51], [52], [53])), join=joined_views)
def step3p7() -> nn.Module:
    vision = WIDTHS | {"image_size": 64, "patch_size": 4, "max_position_embeddings": 256}
    config = transformers.Step3p7Config(
        vision_config=vision,
        text_config=TEXT
        | {
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "num_sliding_attention_heads": 6,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 24,
        },
        image_token_id=IMAGE,
    )
    return transformers.Step3p7ForConditionalGeneration(config)


OCR_SAM = {
    "hidden_size": 24,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_dim": 40,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "downsample_channels": [16, 24],
}
OCR_TEXT = TEXT | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}


@family(whole_and_crops((6, 6), 64, separators=1), join=joined_views, newlines=(1, 1, 1))
def deepseek_ocr2() -> nn.Module:
    """With fewer queries than the class makes."""
    encoder = WIDTHS | {"num_key_value_heads": 3}
    config = transformers.DeepseekOcr2Config(
        vision_config={"sam_config": OCR_SAM, "encoder_config": encoder},
        text_config=OCR_TEXT,
        image_token_id=IMAGE,
    )
    model = transformers.DeepseekOcr2ForConditionalGeneration(config)
    model.model.vision_tower.query_768_resolution = nn.Embedding(6, 24)
    return model


def two_views(index: int, generator: Generator) -> Image:
    """An image as Molmo 2's processor gives it: a small view of 2 x 2 tokens, and a large one whose
    patches lie in two crops, the last column pooled from fewer."""
    rows, columns = SIZES[index % 3]
    patches = torch.randn(3, 16, 48, generator=generator)  # crops of 4 x 4 patches
    small = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    large = torch.randint(16, 48, (rows * columns, 4), generator=generator)
    large[columns - 1 :: columns, 2:] = -1
    inputs = {
        "pixel_values": patches,
        "image_token_pooling": torch.cat([small, large]),
        "image_grids": torch.tensor([[2, 2, rows, columns]]),
    }
    row = [*[IMAGE] * columns, 56]
    return inputs, [52, *[IMAGE] * 4, 53, 51, *row * rows, 53]


def joined_by_index(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The inputs of all images; indices go on counting patches."""
    inputs = joined_views(images, owner, samples)
    indices = [
        torch.where(image["image_token_pooling"] < 0, -1, image["image_token_pooling"] + first * 48)
        for first, image in enumerate(images)
    ]
    return inputs | ({"image_token_pooling": torch.cat(indices)} if images else {})


@family(two_views, extras=image_types, join=joined_by_index)
def molmo2() -> nn.Module:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    config = transformers.Molmo2Config(
        vision_config=WIDTHS | heads | {"image_size": [16, 16], "patch_size": 4},
        adapter_config=heads
        | {
            "vision_feature_layer": [1, 0],
            "hidden_size": 24,
            "intermediate_size": 40,
            "text_hidden_size": 32,
        },
        text_config=TEXT | {"head_dim": 8, "additional_vocab_size": 0},
        image_patch_id=IMAGE,
        image_start_token_id=51,
        low_res_image_start_token_id=52,
        image_end_token_id=53,
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def tiles(index: int, generator: Generator) -> Image:
    """A page as Granite Docling's processor gives it: a tile alone, or three with a thumbnail."""
    count = (1, 4)[index % 2]
    ids = []
    for tile in range(count):
        label = 52 if tile == 0 else 54 if tile == 3 else 53
        ids += [*([50] if tile == 3 else []), 51, label, *[IMAGE] * 4]
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels}, [*ids, 51]


def tiles_of_samples(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """Tiles [B,T,3,H,W] of every sample, and which are there."""
    if not images:
        return {}
    of_sample = [
        [image["pixel_values"] for image, row in zip(images, owner, strict=True) if row == sample]
        for sample in range(samples)
    ]
    counts = [sum(map(len, parts)) for parts in of_sample]
    pixels = torch.zeros(samples, max(counts), 3, 32, 32)
    for sample, parts in enumerate(of_sample):
        if parts:
            pixels[sample, : counts[sample]] = torch.cat(parts)
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {"pixel_values": pixels, "pixel_attention_mask": there}


@family(tiles, join=tiles_of_samples)
def granite_docling() -> nn.Module:
    config = transformers.GraniteDoclingConfig(
        text_config=TEXT | {"embedding_multiplier": 2.0, "attention_multiplier": 0.3},
        vision_config=WIDTHS
        | {
            "image_size": 32,
            "patch_size": 4,
            "scale_factor": 4,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.GraniteDoclingForConditionalGeneration(config)


def grids_with_ends(index: int, generator: Generator) -> Image:
    """Images of no, two or three crops in a grid, each of 2 x 2 tokens, and a whole of 4 x 4; a
    placeholder ends every row, and one the image."""
    columns, rows = ((0, 0), (2, 1), (1, 3))[index % 3]
    inputs, _ = whole_and_crops((0, 0), 64)(index, generator)
    inputs["patches_grid"] = torch.tensor([[columns, rows]])
    crops = 2 * rows * (2 * columns + 1) if rows else 0
    return inputs, [IMAGE] * (crops + 4 * 5 + 1)


def joined_in_lists(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The inputs of all images, whose counts are lists."""
    inputs = joined_views(images, owner, samples)
    lists = ("num_local_patches", "patches_grid")
    return {name: x.tolist() if name in lists else x for name, x in inputs.items()}


@family(grids_with_ends, join=joined_in_lists, newlines=(5, 7, 11))
def unlimited_ocr() -> nn.Module:
    """With a window of three written tokens."""
    encoder = WIDTHS | {"image_size": 16, "patch_size": 4}
    config = transformers.UnlimitedOcrConfig(
        vision_config={"sam_config": OCR_SAM, "encoder_config": encoder},
        text_config=OCR_TEXT | {"sliding_window": 3},
        image_token_id=IMAGE,
    )
    return transformers.UnlimitedOcrForConditionalGeneration(config)
