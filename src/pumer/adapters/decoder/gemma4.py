"""Gemma 4 (Gemma Team, 2026) as transformers has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.vision import VisionCapture
from pumer.reducers.tokens import Grid


@register
class Gemma4Adapter(AnySizeAdapter):
    """Squares of patches are averaged; in small models the last layers read the keys of earlier
    ones, which have to be reduced before these."""

    family = "Gemma 4"
    classes: ClassVar[tuple[str, ...]] = ("Gemma4ForConditionalGeneration", "Gemma4Model")
    image_delimiters = (1, 1)
    placeholder_hook = None
    other_tokens = ("video_token_id", "audio_token_id")
    on_host = ("image_position_ids",)
    grouped = False
    padded = True

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).embed_vision

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.pooling_kernel_size ** 2)

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        side = config_of(trunk).vision_config.pooling_kernel_size
        last = captured.inputs["image_position_ids"].amax(1).tolist()
        return [((row + 1) // side, (column + 1) // side) for column, row in last]

    def key_layers(self, model: nn.Module) -> list[int]:
        config = config_of(model).get_text_config()
        layer_types = config.layer_types
        shared = config.num_hidden_layers - config.num_kv_shared_layers
        last_of_type = {name: index for index, name in enumerate(layer_types[:shared])}
        return [
            index if index < shared else last_of_type[name]
            for index, name in enumerate(layer_types)
        ]

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        super().install(patch, model, capture)
        patch.wrap(self.language(model), "_maybe_slice_kv_shared_inputs", _unsliced)


@register
class Gemma4UnifiedAdapter(Gemma4Adapter):
    """Patches go into the language model without a tower."""

    family = "Gemma 4 Unified"
    classes: ClassVar[tuple[str, ...]] = (
        "Gemma4UnifiedForConditionalGeneration",
        "Gemma4UnifiedModel",
    )
    reads_tower = False

    def vision(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).embed_vision

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        last = captured.inputs["image_position_ids"].amax(1).tolist()
        return [(row + 1, column + 1) for column, row in last]

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return 0, 1, 1

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        AnySizeAdapter.install(self, patch, model, capture)


def _unsliced(
    language: Any, stock: Callable[..., Any], states: Tensor, *along_tokens: Any, **_: Any
) -> Any:
    """In place of `_maybe_slice_kv_shared_inputs`, which leaves the last layers only the tokens
    that logits are asked of: all, as the layers before them have it."""
    return states, *along_tokens[:3]
