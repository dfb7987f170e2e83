"""Aria (Li et al., 2024) as transformers has it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid


@register
class AriaAdapter(DecoderAdapter):
    """The tokens of an image are learned queries that look at all patches: they have no places in
    it."""

    family = "Aria"
    classes: ClassVar[tuple[str, ...]] = ("AriaForConditionalGeneration", "AriaModel")
    image_delimiters = (1, 1)
    crop_gap = 0
    reads_tower = False

    def default_grid(self, model: nn.Module) -> Grid:
        queries = config_of(model).projector_patch_to_query_dict.values()
        return 1, max(map(int, queries))

    def patches_per_token(self, model: nn.Module) -> int:
        return math.ceil(max(map(int, config_of(model).projector_patch_to_query_dict)) / 256)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        return one_span_each(output.pooler_output, None, {})
