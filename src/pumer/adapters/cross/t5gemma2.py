"""T5Gemma 2 (Google, 2025) as transformers has it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.cross.encoder_decoder import EncoderDecoderAdapter
from pumer.reducers.tokens import Grid


@register
class T5Gemma2Adapter(EncoderDecoderAdapter):
    """The encoder is Gemma 3 with a SigLIP tower, and the decoder reads it and itself by one
    attention. Images are never cropped."""

    family = "T5Gemma 2"
    classes: ClassVar[tuple[str, ...]] = ("T5Gemma2ForConditionalGeneration", "T5Gemma2Model")
    image_delimiters = (1, 1)

    def trunk(self, model: Any) -> Any:
        inner = model.model if hasattr(model, "lm_head") else model
        return getattr(inner, "encoder", inner)  # the trunk's own is itself

    def writer(self, model: Any) -> Any:
        return (model.model if hasattr(model, "lm_head") else model).decoder

    def default_grid(self, model: nn.Module) -> Grid:
        side = math.isqrt(self.trunk(model).config.mm_tokens_per_image)
        return side, side

    def patches_per_token(self, model: nn.Module) -> int:
        vision = self.trunk(model).config.vision_config
        rows, _ = self.default_grid(model)
        return (vision.image_size // vision.patch_size // rows) ** 2

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        vision = self.trunk(model).config.vision_config
        return vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads
