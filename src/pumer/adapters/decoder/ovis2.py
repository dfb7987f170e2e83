"""Ovis 2 (Lu et al., 2024) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class Ovis2Adapter(DecoderAdapter):
    """An image is a thumbnail and a grid of crops, with tokens between them that have embeddings of
    their own; features are shares of the words of a visual vocabulary."""

    family = "Ovis 2"
    classes: ClassVar[tuple[str, ...]] = ("Ovis2ForConditionalGeneration", "Ovis2Model")
    structure_tokens = ("visual_indicator_token_ids",)
    crop_gap = 1

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).head_linear

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision, projection = super().vision_macs(model, image, tower)
        return vision, projection + image * self.trunk(model).visual_embeddings_table.weight.numel()

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.hidden_stride ** 2)
