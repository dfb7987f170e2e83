"""Muse Glimmer and Muse Spark (Meta, 2026) as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.macs import linear_weights


@register
class MuseGlimmerAdapter(AnySizeAdapter):
    """Patches stand in the order of windows; squares of them become tokens behind the tower."""

    family = "Muse Glimmer"
    classes: ClassVar[tuple[str, ...]] = ("MuseGlimmerForConditionalGeneration", "MuseGlimmerModel")
    image_delimiters = (1, 1)
    grouped = False

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vision_adapter

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.merge_size ** 2)

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision, projection = super().vision_macs(model, image, tower)
        return vision, projection + image * linear_weights(self.trunk(model).vision_projection)

    def tower_attention(self, model: nn.Module) -> Any:
        attentions = self.tower_attentions(model)
        return attentions[max(attentions)]

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        kinds = config_of(model).vision_config.layer_types
        attentions = super().tower_attentions(model)
        return {n: attentions[n] for n in attentions if kinds[n - 1] == "full_attention"}

    def token_order(self, trunk: Any, captured: Captured) -> Tensor | None:
        tower, frames = self.vision(trunk), captured.inputs["image_grid_thw"]
        return get_vision_window_index(
            frames, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )[0].argsort()


@register
class MuseSparkAdapter(MuseGlimmerAdapter):
    """The same with audio, which is left as it is, and a mixture of experts."""

    family = "Muse Spark"
    classes: ClassVar[tuple[str, ...]] = ("MuseSparkForConditionalGeneration", "MuseSparkModel")
    structure_tokens = ("audio_token_id",)
