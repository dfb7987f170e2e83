"""Dots 3 Note (rednote-hilab, 2026) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.costs import expert_weights


@register
class Dots3NoteAdapter(AnySizeAdapter):
    """Four patches make a token; audio is left as it is."""

    family = "Dots 3 Note"
    classes: ClassVar[tuple[str, ...]] = ("Dots3NoteForConditionalGeneration", "Dots3NoteModel")
    image_delimiters = (1, 1)
    placeholder_hook = None
    other_tokens = ("video_token_id", "audio_token_id")

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).merger

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision, projection = super().vision_macs(model, image, tower)
        top_k = config_of(model).vision_config.num_experts_per_tok
        experts = sum(expert_weights(block, top_k) for block in self.vision(model).blocks)
        return vision + image * self.patches_per_token(model) * experts, projection
