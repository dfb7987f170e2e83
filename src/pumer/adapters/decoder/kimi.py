"""Kimi K2.5 (Moonshot AI, 2026) as transformers has it."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class KimiK25Adapter(AnySizeAdapter):
    """The tower has rows of patches, and gathers four for a token."""

    family = "Kimi K2.5"
    classes: ClassVar[tuple[str, ...]] = ("Kimi_K25ForConditionalGeneration", "Kimi_K25Model")
    image_delimiters = (1, 1)
    grouped = False

    def patches_per_token(self, model: nn.Module) -> int:
        return math.prod(config_of(model).vision_config.merge_kernel_size)
