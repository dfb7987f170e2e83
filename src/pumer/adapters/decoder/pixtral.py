"""Mistral 3 and LightOnOCR, whose tower is Pixtral (Agrawal et al., 2024), as
transformers has them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.reducers.tokens import Grid


@register
class PixtralAdapter(AnySizeAdapter):
    """A token of the prompt behind every row of an image says that it ends."""

    family = "Mistral 3"
    classes: ClassVar[tuple[str, ...]] = (
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
        "LightOnOcrForConditionalGeneration",
        "LightOnOcrModel",
    )
    image_delimiters = (0, 1)
    on_host = ("image_sizes",)
    grouped = False
    merges_in_tower = True

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).spatial_merge_size ** 2)

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        config = config_of(trunk)
        side = config.vision_config.patch_size * config.spatial_merge_size
        sizes = captured.inputs["image_sizes"]
        return [(int(rows) // side, int(columns) // side) for rows, columns in sizes]
