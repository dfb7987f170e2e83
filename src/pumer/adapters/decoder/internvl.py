"""InternVL (Chen et al., 2024) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class InternVLAdapter(DecoderAdapter):
    """An image is one crop or several, between a token that opens and one that closes it; four
    patches make a token."""

    family = "InternVL"
    classes: ClassVar[tuple[str, ...]] = (
        "InternVLForConditionalGeneration",
        "InternVLModel",
        "QianfanOCRForConditionalGeneration",
        "QianfanOCRModel",
    )
    image_delimiters = (1, 1)
    crop_gap = 0
    merges_in_tower = True

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def patches_per_token(self, model: nn.Module) -> int:
        return round(1 / config_of(model).downsample_ratio) ** 2
