"""MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR (OpenBMB, 2026) as transformers has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.macs import linear_weights
from pumer.reducers.tokens import Grid

FINE = "4x"
"""The mode in which the tower merges no patches, of which the projector makes one of four."""


@register
class MiniCPMAdapter(AnySizeAdapter):
    """Every slice of a large image is an image; the tower itself may merge squares of patches."""

    family = "MiniCPM-V"
    classes: ClassVar[tuple[str, ...]] = (
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_6Model",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniCPMV4_7Model",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMOcrModel",
    )
    image_delimiters = (1, 1)
    placeholder_hook = None
    on_host = ("target_sizes",)
    grouped = False

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).merger

    def patches_per_token(self, model: nn.Module) -> int:
        return self._projected(model) * (1 if config_of(model).downsample_mode == FINE else 4)

    def _projected(self, model: nn.Module) -> int:
        config = config_of(model)
        return int(math.prod(config.merge_kernel_size) ** config.merger_times)

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Behind the layer that merges patches a quarter of them goes on."""
        config, vision = config_of(model), self.vision(model)
        crops, tokens = self.tower_entry(model, image)
        patches = tokens * self.patches_per_token(model)
        _, width, _ = self.tower_shape(model)
        merges = config.downsample_mode != FINE
        macs = patches * vision.embeddings.patch_embedding.weight.numel()
        for layer_index, layer in enumerate(vision.encoder.layers):
            merged = merges and layer_index > config.insert_layer_id
            count = patches // 4 if merged else patches
            macs += count * linear_weights(layer) + 2 * count**2 * width
        if merges:
            attention = linear_weights(vision.vit_merger.self_attn)
            macs += patches * (attention + 2 * 4 * width)
            macs += patches // 4 * (linear_weights(vision.vit_merger) - attention)
        return crops * macs, image * linear_weights(self.projector(model))

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        mode = captured.inputs.get("downsample_mode") or config_of(trunk).downsample_mode
        side = math.isqrt(self._projected(trunk)) * (1 if mode == FINE else 2)
        sizes = captured.inputs["target_sizes"].tolist()
        return [(rows // side, columns // side) for rows, columns in sizes]
