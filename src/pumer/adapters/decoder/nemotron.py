"""Nemotron-H Omni (NVIDIA, 2026) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.macs import linear_weights
from pumer.reducers.tokens import Grid


@register
class NemotronOmniAdapter(AnySizeAdapter):
    """A layer is attention, a state space or an MLP; the tower puts summary tokens before every
    image. Audio is left as it is."""

    family = "Nemotron Omni"
    classes: ClassVar[tuple[str, ...]] = ("NemotronH_Omni_Reasoning_V3",)
    renumbers = False  # there are no positions to be counted anew
    image_delimiters = (1, 1)
    placeholder_hook = None
    other_tokens = ("video_token_id", "audio_token_id")
    on_host = ("image_grid_hw",)
    grouped = False

    def language(self, model: nn.Module) -> Any:
        return self.trunk(model).language_model.model

    def layer_attention(self, layer: Any) -> Any:
        return layer.mixer if layer.block_type == "full_attention" else None

    def head_macs(self, model: nn.Module) -> int:
        return linear_weights(self.trunk(model).language_model.lm_head)

    def patches_per_token(self, model: nn.Module) -> int:
        return round(1 / config_of(model).downsample_ratio) ** 2

    def tower_prefix(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.num_summary_tokens)

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        side = round(1 / config_of(trunk).downsample_ratio)
        sizes = captured.inputs["image_grid_hw"].tolist()
        return [(rows // side, columns // side) for rows, columns in sizes]
