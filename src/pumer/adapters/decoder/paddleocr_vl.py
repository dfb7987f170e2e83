"""PaddleOCR-VL (Cui et al., 2025) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class PaddleOCRVLAdapter(AnySizeAdapter):
    """The tower has rows of patches, and the projector makes a token of four."""

    family = "PaddleOCR-VL"
    classes: ClassVar[tuple[str, ...]] = ("PaddleOCRVLForConditionalGeneration", "PaddleOCRVLModel")
    renumbers = False  # an image token has three positions: time, row and column
    image_delimiters = (1, 1)
    other_tokens = ()
    grouped = False
