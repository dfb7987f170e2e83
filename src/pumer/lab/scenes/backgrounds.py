"""Backgrounds of generated images: noise with patterns, or photographs.

Shape suffixes: B images, S side in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumer.lab.data.image_store import open_store
from pumer.lab.data.images import open_image
from pumer.lab.scenes.dice import Dice

SIDE = 96
"""Pixels of the benchmark's images, at which patterns and shapes have scale 1."""
_ROOM = 4 / 3  # shorter side of a photograph, in sides of the crops that are taken of it
_HELD_OUT = {"val": 8, "test": 9}  # of every ten, which one is of these splits


@functools.lru_cache(maxsize=4)
def patterns(image_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel noise [2S, 2S + 2] and four textures [4, 2S, 2S], int16 in about -32..32; images take
    crops of them."""
    side = 2 * image_size
    dice = Dice(0, torch.zeros(1, dtype=torch.int64))
    noise = (dice.roll(4, side, side + 2)[0] % 17 - 8).sum(0)

    def clouds(cells: int) -> Tensor:
        coarse = (dice.roll(cells, cells)[0] % 65 - 32).float()[None, None]
        return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0, 0]

    at = torch.arange(side) * SIDE / image_size
    y, x = at[:, None], at[None]
    waves = 26 * torch.sin(0.55 * x + 0.33 * y)
    weave = 16 * (torch.sin(0.8 * x) + torch.sin(0.8 * y))
    textures = torch.stack([clouds(10), clouds(32), waves, weave])
    return noise.to(torch.int16).to(device), textures.round().to(torch.int16).to(device)


def split_of(position: int) -> str:
    """The split that photograph `position` of a sorted list is of: 8 of 10 are for training."""
    return {held: split for split, held in _HELD_OUT.items()}.get(position % 10, "train")


@functools.lru_cache(maxsize=4)
def photographs(path: str, split: str, image_size: int) -> tuple[Tensor, ...]:
    """The photographs of a split, for `draw_scenes`: uint8 [3, H, W] each.

    No photograph is in two splits. Their shorter side is a third longer than that of the images.

    Args:
        path: folder, LMDB file or Parquet file.
        split: train, val or test.
        image_size: side of the images in pixels.

    Raises ValueError if a split has none, or one cannot be read.
    """
    store = open_store(Path(path).expanduser())
    names = sorted(store.keys())
    chosen = [name for position, name in enumerate(names) if split_of(position) == split]
    if not chosen:
        raise ValueError(
            f"{path} has {len(names)} photographs, none of them for {split}: of every ten, eight "
            "are for train, one for val and one for test"
        )
    return tuple(_resized(open_image(store[name], name), image_size) for name in chosen)


def _resized(image: Image.Image, image_size: int) -> Tensor:
    factor = _ROOM * image_size / min(image.size)
    width, height = (round(factor * side) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def crops(dice: Dice, photographs: Sequence[Tensor], side: int) -> Tensor:
    """A square of a photograph for every image, half of them mirrored: int16 [B, 3, S, S]."""
    squares = []
    for chosen, y, x, mirrored in dice.roll(4).tolist():
        photograph = photographs[chosen % len(photographs)]
        height, width = photograph.shape[1:]
        y, x = y % (height - side + 1), x % (width - side + 1)
        square = photograph[:, y : y + side, x : x + side]
        squares.append(square.flip(2) if mirrored % 2 else square)
    return torch.stack(squares).to(torch.int16)
