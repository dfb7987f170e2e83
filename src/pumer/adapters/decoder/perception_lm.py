"""Perception LM (Cho et al., 2025) and FastVLM (Vasu et al., 2025) as transformers has them: their
towers are timm's, which cannot be looked into."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid

DEFAULT_TOKENS = 256
"""Of an image, where the configuration does not say."""


class OfTimm(DecoderAdapter):
    reads_tower = False

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return 0, 1, 1  # their attention, if any, is not counted

    def default_grid(self, model: nn.Module) -> Grid:
        side = math.isqrt(getattr(config_of(model), "image_seq_length", DEFAULT_TOKENS))
        return side, side

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        side = math.isqrt(len(output.pooler_output[0]))
        grid = (side, side) if side**2 == len(output.pooler_output[0]) else None
        return one_span_each(output.pooler_output, grid, {})


@register
class PerceptionLMAdapter(OfTimm):
    """An image is one crop or several, each with a budget of its own."""

    family = "Perception LM"
    classes: ClassVar[tuple[str, ...]] = (
        "PerceptionLMForConditionalGeneration",
        "PerceptionLMModel",
    )


@register
class FastVlmAdapter(OfTimm):
    """A tower of convolutions."""

    family = "FastVLM"
    classes: ClassVar[tuple[str, ...]] = ("FastVlmForConditionalGeneration", "FastVlmModel")
