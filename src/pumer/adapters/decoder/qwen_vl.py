"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and Qwen4 (Wang et al., 2024; Bai et al., 2025), and the
thinkers of Qwen-Omni, as transformers has them.

Positions are three-dimensional, and decoding goes on from an offset that the model keeps itself:
neither changes, as the model goes on counting every token.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured


@register
class QwenVLAdapter(AnySizeAdapter):
    """Four patches make a token."""

    family = "Qwen-VL"
    classes: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLModel",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeModel",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Model",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeModel",
        "Qwen4ExpForConditionalGeneration",
        "Qwen4ExpModel",
        "Cosmos3OmniForConditionalGeneration",
        "Cosmos3OmniModel",
        "CohereCompassForConditionalGeneration",
        "CohereCompassModel",
    )
    renumbers = False  # an image token has three: time, row and column
    image_delimiters = (1, 1)
    merges_in_tower = True
    along_tokens = ("ple_input_ids",)  # of Qwen4's layers, which look up n-grams

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).merger

    def tower_mergers(self, model: nn.Module) -> list[nn.Module]:
        vision = self.vision(model)
        return [vision.merger, *getattr(vision, "deepstack_merger_list", ())]

    def tower_acts(self, model: nn.Module) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.tower_attentions(model))

    def tower_keys(self, model: nn.Module, layer_index: int, length: int) -> int:
        vision = self.vision(model)
        if layer_index in self.tower_acts(model):
            return length
        return min(length, (vision.window_size // vision.patch_size) ** 2)

    def tower_windows(self, trunk: Any, captured: Captured) -> list[int]:
        windows = self._windows(trunk, captured)
        unit = self.patches_per_token(trunk)
        return [] if windows is None else (windows[1].diff() // unit).tolist()

    def tower_attention(self, model: nn.Module) -> Any:
        # The last block; in Qwen2.5-VL the last one that sees the whole image.
        attentions = self.tower_attentions(model)
        return attentions[max(attentions)]

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        attentions = super().tower_attentions(model)
        full = getattr(config_of(model).vision_config, "fullatt_block_indexes", None)
        return {index + 1: attentions[index + 1] for index in sorted(full)} if full else attentions

    def token_order(self, trunk: Any, captured: Captured) -> Tensor | None:
        windows = self._windows(trunk, captured)  # in whose order patches stand
        return None if windows is None else windows[0].argsort()

    def _windows(self, trunk: Any, captured: Captured) -> tuple[Tensor, Tensor] | None:
        """Index of every token in the order of windows, and where windows end; None without."""
        tower = self.vision(trunk)
        if not hasattr(tower, "window_size"):
            return None
        index, ends = get_vision_window_index(
            captured.inputs["image_grid_thw"],
            tower.spatial_merge_size,
            tower.window_size,
            tower.patch_size,
        )
        return index, ends


@register
class QwenOmniAdapter(QwenVLAdapter):
    """The part of Qwen-Omni that thinks, and writes text; audio is left as it is."""

    family = "Qwen-Omni"
    classes: ClassVar[tuple[str, ...]] = (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerModel",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerModel",
    )
    other_tokens = ("video_token_id", "audio_token_id")


@register
class Exaone45Adapter(QwenVLAdapter):
    """EXAONE 4.5 (LG AI Research, 2026): Qwen2.5-VL's tower, and one position to a token."""

    family = "EXAONE 4.5"
    classes: ClassVar[tuple[str, ...]] = ("Exaone4_5_ForConditionalGeneration", "Exaone4_5_Model")
    renumbers = True


@register
class HyperCLOVAXAdapter(Exaone45Adapter):
    """HyperCLOVA X Vision: the same with a projector behind the tower's own."""

    family = "HyperCLOVA X"
    classes: ClassVar[tuple[str, ...]] = (
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        "HyperCLOVAXVisionV2Model",
    )

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).projector
