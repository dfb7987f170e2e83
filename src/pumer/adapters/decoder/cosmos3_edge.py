"""Cosmos 3 Edge (NVIDIA, 2026) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class Cosmos3EdgeAdapter(AnySizeAdapter):
    """Four patches make a token."""

    family = "Cosmos 3 Edge"
    classes: ClassVar[tuple[str, ...]] = (
        "Cosmos3EdgeForConditionalGeneration",
        "Cosmos3EdgeModel",
    )
    renumbers = False  # an image token has three positions: time, row and column
    image_delimiters = (1, 1)
