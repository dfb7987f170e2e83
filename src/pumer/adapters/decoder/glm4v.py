"""GLM-4V, GLM-4.6V, their mixtures of experts, GLM-OCR and GLM-5.3-Flash (GLM-V Team, 2025) as
transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter


@register
class Glm4vAdapter(AnySizeAdapter):
    """A convolution makes a token of four patches before the projector sees them."""

    family = "GLM-V"
    classes: ClassVar[tuple[str, ...]] = (
        "Glm4vForConditionalGeneration",
        "Glm4vModel",
        "Glm46VForConditionalGeneration",
        "Glm46VModel",
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeModel",
        "GlmOcrForConditionalGeneration",
        "GlmOcrModel",
        "Glm5NextForConditionalGeneration",
        "Glm5NextModel",
    )
    renumbers = False  # an image token has three positions: time, row and column
    image_delimiters = (1, 1)

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        """The convolution takes four patches at once."""
        vision, projection = super().vision_macs(model, image, tower)
        spared = image * (self.patches_per_token(model) - 1)
        return vision - spared * self.vision(model).downsample.weight.numel(), projection

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).merger
