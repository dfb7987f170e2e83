"""Dots 3 Note (rednote-hilab, 2026) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


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
