"""Gemma 3n (Gemma Team, 2025) as transformers has it."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.gemma4 import Gemma4Adapter
from pumer.adapters.decoder.perception_lm import OfTimm
from pumer.reducers.tokens import Grid


@register
class Gemma3nAdapter(OfTimm):
    """Layers pass on several streams of a token (AltUp), which stay and go together; the last ones
    read the keys of earlier ones. Audio is left as it is."""

    family = "Gemma 3n"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3nForConditionalGeneration", "Gemma3nModel")
    image_delimiters = (1, 1)
    other_tokens = ("audio_token_id",)
    key_layers = Gemma4Adapter.key_layers

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).embed_vision

    def default_grid(self, model: nn.Module) -> Grid:
        side = math.isqrt(config_of(model).vision_soft_tokens_per_image)
        return side, side
