"""SmolVLM and Idefics3 (Laurençon et al., 2024; Marafioti et al., 2025) as transformers has
them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.parts import SquareMerge
from pumer.adapters.decoder.prompt import CropGroups, ImageSpan


@register
class SmolVLMAdapter(SquareMerge, DecoderAdapter):
    """An image is a grid of crops and a thumbnail at the end, with tokens before each
    that say which."""

    family = "SmolVLM"
    classes: ClassVar[tuple[str, ...]] = ("SmolVLMForConditionalGeneration", "SmolVLMModel")
    image_delimiters = (2, 1)
    merge_side = "scale_factor"
    merges_in_tower = True
    tower_mask = "patch_attention_mask"

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).connector.modality_projection

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        # Outputs are joined by sample; which crops are of one image, `crop_groups` finds.
        rows, columns = grid = self.default_grid(trunk)
        crops = [
            crop
            for sample in output.pooler_output
            if len(sample)  # an empty one would count as a crop
            for crop in sample.split(rows * columns)
        ]
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
