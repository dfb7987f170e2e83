"""InternVL (Chen et al., 2024) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each, pool_squares, tower_layers
from pumer.adapters.decoder.prompt import CropGroups, ImageSpan
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Grid


@register
class InternVLAdapter(DecoderAdapter):
    """An image is one crop or several, between a token that opens and one that closes it; four
    patches make a token."""

    family = "InternVL"
    classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration", "InternVLModel")
    image_delimiters = (1, 1)

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def tower_attention(self, model: nn.Module) -> Any:
        layers = tower_layers(self.trunk(model).vision_tower)
        return layers[config_of(model).vision_feature_layer].attention

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        layers = tower_layers(self.trunk(model).vision_tower)
        return {index + 1: layer.attention for index, layer in enumerate(layers)}

    def default_grid(self, model: nn.Module) -> Grid:
        rows, columns = super().default_grid(model)
        factor = self._factor(model)
        return rows // factor, columns // factor

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        rows, columns = self.default_grid(trunk)
        return pool_squares(vision_features(captured, tower=True), rows * columns)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        return one_span_each(
            output.pooler_output, self.default_grid(trunk), self.vision_facts(trunk, captured)
        )

    def crop_groups(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> CropGroups:
        rows, columns = self.default_grid(trunk)
        return CropGroups.of(image_BS, rows * columns, features, None)

    def patches_per_token(self, model: nn.Module) -> int:
        return self._factor(model) ** 2

    @staticmethod
    def _factor(model: nn.Module) -> int:
        return round(1 / config_of(model).downsample_ratio)
