"""Hunyuan-VL and HY 4 (Tencent, 2025 and 2026) as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.reducers.tokens import Grid


@register
class HunYuanVLAdapter(AnySizeAdapter):
    """Among an image's placeholders are one that opens it, one behind every row, and one that
    closes it."""

    family = "Hunyuan-VL"
    classes: ClassVar[tuple[str, ...]] = ("HunYuanVLForConditionalGeneration", "HunYuanVLModel")
    renumbers = False  # an image token has several positions
    other_tokens: ClassVar[tuple[str, ...]] = ()
    grouped = False

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).patch_merger

    def structure(self, grid: Grid) -> Tensor:
        rows, columns = grid
        index = torch.arange(rows * (columns + 1) + 2) - 1
        last = len(index) - 2
        return (index < 0) | (index % (columns + 1) == columns) | (index == last)


@register
class HYV4VLAdapter(HunYuanVLAdapter):
    """HY 4 (Tencent, 2026): of these the rows' ends alone."""

    family = "HY 4 VL"
    classes: ClassVar[tuple[str, ...]] = ("HYV4VLForConditionalGeneration", "HYV4VLModel")
    image_delimiters = (1, 1)
    other_tokens = ("video_token_id",)

    def structure(self, grid: Grid) -> Tensor:
        rows, columns = grid
        return torch.arange(rows * (columns + 1)) % (columns + 1) == columns

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        """The projector is made of convolutions."""
        vision, _ = super().vision_macs(model, image, tower)
        projector: Any = self.projector(model)
        weights = projector.proj_conv.weight.numel() + projector.proj_out.weight.numel()
        return vision, image * weights
