"""Photographs as backgrounds of generated images."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumer.lab.data.image_store import open_store
from pumer.lab.data.images import open_image

_ROOM = 4 / 3  # shorter side of a photograph, in sides of the crops that are taken of it
_HELD_OUT = {"val": 8, "test": 9}  # of every ten, which one is of these splits


def split_of(number: int) -> str:
    """The split that photograph `number` of a sorted list is of: 8 of 10 are for training."""
    return {held: split for split, held in _HELD_OUT.items()}.get(number % 10, "train")


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
    chosen = [name for number, name in enumerate(names) if split_of(number) == split]
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
