"""SmolVLM and Idefics3 (Laurençon et al., 2024; Marafioti et al., 2025) as transformers has
them."""

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
class SmolVLMAdapter(DecoderAdapter):
    """An image is a grid of crops and a thumbnail at the end, with tokens before each
    that say which."""

    family = "SmolVLM"
    classes: ClassVar[tuple[str, ...]] = ("SmolVLMForConditionalGeneration", "SmolVLMModel")
    image_delimiters = (2, 1)

    def language(self, model: nn.Module) -> Any:
        return self.trunk(model).text_model

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).connector.modality_projection

    def tower_attention(self, model: nn.Module) -> Any:
        return tower_layers(self.trunk(model).vision_model)[-1].self_attn

    def vision(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vision_model

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).scale_factor ** 2)

    def default_grid(self, model: nn.Module) -> Grid:
        rows, columns = super().default_grid(model)
        factor = config_of(model).scale_factor
        return rows // factor, columns // factor

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        rows, columns = self.default_grid(trunk)
        return pool_squares(vision_features(captured), rows * columns)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        # Outputs are joined by sample; which crops are of one image, `crop_groups` finds.
        rows, columns = grid = self.default_grid(trunk)
        crops = [crop for sample in output.pooler_output for crop in sample.split(rows * columns)]
        return one_span_each(crops, grid, self.vision_facts(trunk, captured))

    def crop_groups(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> CropGroups:
        rows, columns = self.default_grid(trunk)
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("give input_ids: only they say which crops are of one image")
        return CropGroups.of(image_BS, rows * columns, features, ids.to(image_BS.device))


@register
class Idefics3Adapter(SmolVLMAdapter):
    """The same in its older form."""

    family = "Idefics3"
    classes: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration", "Idefics3Model")
    placeholder_hook = "inputs_merger"
