"""Granite Docling (IBM, 2026) as transformers has it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each, pool_squares
from pumer.adapters.decoder.prompt import CropGroups, ImageSpan
from pumer.adapters.decoder.vision import vision_features


@register
class GraniteDoclingAdapter(DecoderAdapter):
    """A page is a grid of crops with tokens before each that say which, and a thumbnail at the end
    if there are several; features are added behind the first layers, too."""

    family = "Granite Docling"
    classes: ClassVar[tuple[str, ...]] = (
        "GraniteDoclingForConditionalGeneration",
        "GraniteDoclingModel",
    )
    image_delimiters = (2, 1)
    placeholder_hook = None  # its mask has another shape

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).connector

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.scale_factor ** 2)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        length = _crop_length(trunk, captured.inputs)
        facts = pool_squares(vision_features(captured), length)
        # Outputs are joined by sample; which crops are of one image, `crop_groups` finds.
        crops = [crop for sample in output.pooler_output for crop in sample.split(length)]
        return one_span_each(crops, (math.isqrt(length),) * 2, facts)

    def crop_groups(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> CropGroups:
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("give input_ids: only they say which crops are of one image")
        length, ids = _crop_length(trunk, inputs), ids.to(image_BS.device)
        return CropGroups.of(image_BS, length, features, ids, from_first=True)


def _crop_length(trunk: Any, inputs: dict[str, Any]) -> int:
    """Tokens of a crop: four times as many where the fine way to the language model is asked of."""
    fine = inputs.get("tile_fine_mask") is not None
    return int(trunk.image_seq_len * (4 if fine else 1))
