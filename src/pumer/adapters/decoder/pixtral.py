"""Mistral 3, Mistral Large 4, LightOnOCR and Pixtral 12B, whose tower is Pixtral's (Agrawal et al.,
2024), as transformers has them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pumer.adapters.base import config_of, is_a, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid

PIXTRAL = "PixtralVisionModel"


@register
class PixtralAdapter(AnySizeAdapter):
    """A token of the prompt behind every row of an image says that it ends."""

    family = "Mistral 3"
    classes: ClassVar[tuple[str, ...]] = (
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
        "LightOnOcrForConditionalGeneration",
        "LightOnOcrModel",
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Model",
    )
    image_delimiters = (0, 1)
    on_host = ("image_sizes",)
    grouped = False
    merges_in_tower = True

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).spatial_merge_size ** 2)

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        side = math.isqrt(self.patches_per_token(trunk))
        side *= config_of(trunk).vision_config.patch_size
        sizes = captured.inputs["image_sizes"]
        return [(int(rows) // side, int(columns) // side) for rows, columns in sizes]


@register
class PixtralLlavaAdapter(PixtralAdapter):
    """Pixtral 12B, a LLaVA with Pixtral's tower."""

    family = "Pixtral"
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration", "LlavaModel")

    def fits(self, model: nn.Module) -> bool:
        return is_a(self.vision(model), (PIXTRAL,))

    def patches_per_token(self, model: nn.Module) -> int:
        return 1

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        if captured.inputs.get("image_sizes") is None:  # images are whole rows of the batch then
            pixels = captured.inputs["pixel_values"]
            captured.inputs["image_sizes"] = [pixels.shape[-2:]] * len(pixels)
            features = output.pooler_output[0].chunk(len(pixels))
            output = BaseModelOutputWithPooling(pooler_output=features)
        return super().image_spans(trunk, output, captured)
