"""VipLLaVA (Cai et al., 2024) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class VipLlavaAdapter(DecoderAdapter):
    """Features of several layers of a CLIP tower, side by side, without [CLS]."""

    family = "VipLLaVA"
    classes: ClassVar[tuple[str, ...]] = ("VipLlavaForConditionalGeneration", "VipLlavaModel")
    merges_in_tower = True

    def has_class_token(self, model: nn.Module) -> bool:
        return True
