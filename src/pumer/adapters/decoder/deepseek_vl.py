"""DeepSeek-VL and Janus (Lu et al., 2024; Chen et al., 2025) as transformers has them."""

from __future__ import annotations

from typing import ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class DeepseekVLAdapter(DecoderAdapter):
    """Every image is one grid of patches; of the hybrid one's two towers the one for small images
    is looked into."""

    family = "DeepSeek-VL"
    classes: ClassVar[tuple[str, ...]] = (
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLModel",
        "DeepseekVLHybridForConditionalGeneration",
        "DeepseekVLHybridModel",
    )


@register
class JanusAdapter(DecoderAdapter):
    """Images that are read, between a token that opens and one that closes them."""

    family = "Janus"
    classes: ClassVar[tuple[str, ...]] = ("JanusForConditionalGeneration", "JanusModel")
    image_delimiters = (1, 1)
