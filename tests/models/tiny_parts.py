"""Settings that tiny decoders share, and how a family of them is described."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Generator, Tensor, nn

from pumer.adapters.decoder import kv_cache

CACHE = next(
    name
    for name in kv_cache.NAMES
    if name in inspect.signature(transformers.LlamaModel.forward).parameters
)
"""What models call their cache."""
LAYERS = 4
"""Layers of every language model."""
VOCABULARY = 60
IMAGE = 57
"""Id of the placeholders; ids from 50 on mean something in one family or another."""
PAD = 0
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CLIP = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
SIGLIP = {name: value for name, value in CLIP.items() if name != "projection_dim"} | {
    "vision_use_head": False
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIDES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
)
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(50, VOCABULARY))}
"""No placeholders in answers."""
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
QWEN_VISION = {
    "depth": 3,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 58,
    "vision_start_token_id": 51,
    "vision_end_token_id": 52,
}
Inputs = dict[str, Tensor]
Image = tuple[Inputs, list[int]]
"""What the processor gives of an image, and what it puts into the prompt."""


def of_batch(inputs: Inputs) -> Inputs:
    """No inputs besides."""
    return {}


def joined(images: Sequence[Inputs], owner: Sequence[int], samples: int) -> Inputs:
    """The inputs of all images, one behind the other."""
    names = images[0] if images else ()
    return {name: torch.cat([image[name] for image in images]) for name in names}


@dataclass(frozen=True)
class Family:
    """A tiny model of a family and prompts for it.

    Args:
        build: makes the model.
        image: the image of this index, from this generator.
        extras: inputs that follow from `input_ids`.
        join: the inputs of all images of a batch, from those of each, the sample of each and the
            number of samples.
        newlines: placeholders of each of the first three images that are no patches.
    """

    build: Callable[[], nn.Module]
    image: Callable[[int, Generator], Image]
    extras: Callable[[Inputs], Inputs] = of_batch
    join: Callable[[Sequence[Inputs], Sequence[int], int], Inputs] = joined
    newlines: tuple[int, int, int] = (0, 0, 0)


FAMILIES: dict[str, Family] = {}


def family(image: Callable[[int, Generator], Image], **more):
    """Function decorator: a family by the name of what builds its model."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FAMILIES[build.__name__] = Family(build, image, **more)
        return build

    return register


def squares(tokens: int, crops: tuple[int, ...] = (1,), side: int = 32, around=None):
    """Images of square crops, `tokens` placeholders each, between the ids `around` (before, behind)
    them."""
    before, behind = around or ([], [])

    def image(index: int, generator: Generator) -> Image:
        count = crops[index % len(crops)]
        pixels = torch.randn(count, 3, side, side, generator=generator)
        return {"pixel_values": pixels}, [*before, *[IMAGE] * tokens * count, *behind]

    return image


def patches_of_any_size(index: int, generator: Generator) -> Image:
    """An image as Qwen-VL's processor gives it: patches of 4 x 4, four of them to a token."""
    rows, columns = ((4, 6), (8, 4), (6, 10))[index % 3]
    patches = torch.randn(rows * columns, 3 * 16, generator=generator)
    grid = torch.tensor([[1, rows, columns]])
    ids = [51, *[IMAGE] * (rows * columns // 4), 52]
    return {"pixel_values": patches, "image_grid_thw": grid}, ids


def image_types(inputs: Inputs) -> Inputs:
    """Which tokens are an image's."""
    return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
