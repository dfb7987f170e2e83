"""MiniMax-M3 (MiniMax, 2026) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class MiniMaxM3Adapter(AnySizeAdapter):
    """Keys are chosen by blocks of what is there, whatever its positions."""

    family = "MiniMax-M3"
    classes: ClassVar[tuple[str, ...]] = (
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3VLModel",
    )
    image_delimiters = (1, 1)
    keeps_positions = False
