"""Aya Vision and Command A Vision (Cohere, 2025) as transformers has them."""

from __future__ import annotations

from typing import ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.parts import SquareMerge


@register
class AyaVisionAdapter(SquareMerge, DecoderAdapter):
    """An image is a grid of crops and a thumbnail at the end, with a token before each."""

    family = "Aya Vision"
    classes: ClassVar[tuple[str, ...]] = ("AyaVisionForConditionalGeneration", "AyaVisionModel")
    image_delimiters = (2, 1)
    merge_side = "downsample_factor"
    crop_gap = 1
    merges_in_tower = True


@register
class Cohere2VisionAdapter(AyaVisionAdapter):
    """The same, with a token behind each."""

    family = "Command A Vision"
    classes: ClassVar[tuple[str, ...]] = (
        "Cohere2VisionForConditionalGeneration",
        "Cohere2VisionModel",
    )
    image_delimiters = (1, 2)
