"""Tiny random-weight models that read images by cross-attention, and padded batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from tiny_parts import GREEDY, IMAGE, LAYERS, PAD, TEXT, Inputs
from torch import Tensor, nn

from pumer.adapters.rebind import METHODS

Sample = tuple[list[int], list[Tensor]]
"""Ids of a prompt, and its images."""
LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
"""Prompts of words and images: one image, two, none."""


@dataclass(frozen=True)
class Cross:
    """A tiny model of a family and inputs for it.

    Args:
        build: makes the model.
        collate: the inputs of a batch of samples.
        side: of an image in pixels.
        placeholders: tokens of the prompt for an image.
        layout: prompts that it takes, `LAYOUT` or as much of it as fits.
    """

    build: Callable[[], nn.Module]
    collate: Callable[[list[Sample]], Inputs]
    side: int = 32
    placeholders: int = 1
    layout: Sequence[Sequence[int | str]] = LAYOUT


FAMILIES: dict[str, Cross] = {}


def family(collate: Callable[[list[Sample]], Inputs], **more):
    """Function decorator: a family by the name of what builds its model."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FAMILIES[build.__name__] = Cross(build, collate, **more)
        return build

    return register


def model(name: str, families: dict[str, Cross] | None = None) -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    made = (families or FAMILIES)[name].build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                wide = "embed" in parameter_name or "lm_head" in parameter_name
                parameter.normal_(std=1.0 if wide else 0.25, generator=generator)
            elif "gate" in parameter_name:
                parameter.fill_(1.0)
    made.generation_config.eos_token_id = None
    return made.eval()


def batch(name: str, rows: Sequence[int] | None = None, families=None) -> Inputs:
    """Inputs for some samples of a family's layout, for all by default."""
    described = (families or FAMILIES)[name]
    layout, samples = described.layout, []
    for row in range(len(layout)) if rows is None else rows:
        generator = torch.Generator().manual_seed(10 + row)
        ids, images = [1], []
        for part in layout[row]:
            if part == "i":
                ids += [IMAGE] * described.placeholders
                images.append(torch.randn(3, described.side, described.side, generator=generator))
            else:
                ids += torch.randint(2, 50, (part,), generator=generator).tolist()
        samples.append((ids, images))
    return described.collate(samples)


def words(samples: list[Sample], side: str = "left") -> Inputs:
    """Ids and mask, padded on a side."""
    longest = max(len(ids) for ids, _ in samples)

    def padded(row: list[int]) -> list[int]:
        padding = [PAD] * (longest - len(row))
        return padding + row if side == "left" else row + padding

    return {
        "input_ids": torch.tensor([padded(ids) for ids, _ in samples]),
        "attention_mask": torch.tensor([padded([1] * len(ids)) for ids, _ in samples]),
    }


def logits(model: nn.Module, inputs: Inputs, **more) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs, **more).logits


def generate(model: nn.Module, inputs: Inputs, **more):
    """What it writes after the prompts, and the logits of every token."""
    settings = GREEDY | {"return_dict_in_generate": True, "output_logits": True} | more
    return model.generate(**inputs, **settings)


def changed(model: nn.Module) -> list[str]:
    """Modules whose methods or hooks are not the stock ones."""
    return [
        name
        for name, module in model.named_modules()
        if METHODS in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


TILES = 2
MLLAMA_TEXT = TEXT | {"cross_attention_layers": [1, 3], "num_hidden_layers": LAYERS}


def in_tiles(samples: list[Sample]) -> Inputs:
    """Images of one tile and of two in turn, and which words look at which; a sample without
    images has padding."""
    inputs = words(samples)
    batch, length = inputs["input_ids"].shape
    most = max(1, max(len(images) for _, images in samples))
    pixels = torch.zeros(batch, most, TILES, 3, 32, 32)
    ratio, tile_mask = torch.zeros(batch, most, dtype=torch.long), torch.zeros(batch, most, TILES)
    tile_mask[..., 0] = 1
    cross = torch.zeros(batch, length, most, TILES)
    for row, (_, images) in enumerate(samples):
        starts = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0].tolist()
        for index, (image, start) in enumerate(zip(images, starts, strict=True)):
            count = 1 + index % 2
            for tile in range(count):
                pixels[row, index, tile] = image.roll(7 * tile, -1)
            ratio[row, index], tile_mask[row, index, :count] = count, 1
            end = starts[index + 1] if index + 1 < len(starts) and index else length
            cross[row, start:end, index, :count] = 1
    return inputs | {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": tile_mask.long(),
        "cross_attention_mask": cross.long(),
    }


@family(in_tiles)
def mllama() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 32,
        "patch_size": 8,
        "vision_output_dim": 72,
        "intermediate_layers_indices": [0, 1],
        "max_num_tiles": TILES,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=MLLAMA_TEXT, image_token_index=IMAGE
    )
    return transformers.MllamaForConditionalGeneration(config)
