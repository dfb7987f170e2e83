"""MiniMax-M3 (MiniMax, 2026) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.macs import linear_weights


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

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        """The first half of the projector takes every patch, the second every token."""
        vision, projection = super().vision_macs(model, image, tower)
        projector: Any = self.projector(model)
        patch = linear_weights(nn.ModuleList([projector.linear_1, projector.linear_2]))
        return vision, projection + image * (self.patches_per_token(model) - 1) * patch
