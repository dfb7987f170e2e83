"""InternVL (Chen et al., 2024) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, plain, pooled, tower_layers
from pumer.adapters.decoder.prompt import Picture
from pumer.adapters.decoder.vision import Tiles
from pumer.adapters.decoder.vision_capture import vision_features
from pumer.reducers.tokens import Grid


@register
class InternVLAdapter(DecoderAdapter):
    """An image is one crop or several, between a token that opens and one that closes it; four
    patches make a token."""

    family = "InternVL"
    classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration", "InternVLModel")
    around = (1, 1)

    def tower_class(self, model: nn.Module) -> bool:
        return True

    def tower_attention(self, model: nn.Module) -> Any:
        layers = tower_layers(self.trunk(model).vision_tower)
        return layers[config_of(model).vision_feature_layer].attention

    def default_grid(self, model: nn.Module) -> Grid:
        rows, columns = super().default_grid(model)
        factor = self._factor(model)
        return rows // factor, columns // factor

    def image_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        rows, columns = self.default_grid(trunk)
        return pooled(vision_features(captured, tower=True), rows * columns)

    def pictures(self, trunk: Any, output: Any, captured: Captured) -> list[Picture]:
        return plain(
            output.pooler_output, self.default_grid(trunk), self.image_facts(trunk, captured)
        )

    def tiles(self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]) -> Tiles:
        rows, columns = self.default_grid(trunk)
        return Tiles.of(image_BS, rows * columns, features, None)

    def patches_per_token(self, model: nn.Module) -> int:
        return self._factor(model) ** 2

    @staticmethod
    def _factor(model: nn.Module) -> int:
        return round(1 / config_of(model).downsample_ratio)
