"""ERNIE 4.5 VL (Baidu, 2025) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class ErnieVLAdapter(AnySizeAdapter):
    """Text and images have experts of their own, and every layer is told which token is which."""

    family = "ERNIE 4.5 VL"
    classes: ClassVar[tuple[str, ...]] = (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeModel",
    )
    renumbers = False  # an image token has three positions: time, row and column
    image_delimiters = (1, 1)
    along_tokens = ("moe_mm_token_type_ids",)

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).resampler_model
