"""Emu3 (Wang et al., 2024) and Apertus 1.5 (Swiss AI, 2026) as transformers has them: images are
words of a visual vocabulary."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.fuyu import WithoutTower
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid


@register
class Emu3Adapter(WithoutTower):
    """Among an image's placeholders is one behind every row that says that it ends; before them
    the prompt has the image's size in words."""

    family = "Emu3"
    classes: ClassVar[tuple[str, ...]] = ("Emu3ForConditionalGeneration", "Emu3Model")
    image_delimiters = (1, 2)
    on_host = ("image_sizes",)
    row_ends = True

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vqmodel

    def side(self, trunk: Any) -> int:
        """Pixels to a side of what becomes one word."""
        return int(trunk.vqmodel.vision_spatial_factor)

    def default_grid(self, model: nn.Module) -> Grid:
        side = 720 // self.side(self.trunk(model))
        return side, side

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        spans = []
        for rows, columns in torch.as_tensor(captured.inputs["image_sizes"]).tolist():
            grid = rows // self.side(trunk), columns // self.side(trunk)
            index, width = torch.arange(grid[0] * (grid[1] + self.row_ends)), grid[1] + 1
            structure = index % width == grid[1] if self.row_ends else None
            spans.append(ImageSpan(len(index), structure, grid))
        return spans


@register
class Apertus1p5Adapter(Emu3Adapter):
    """The ends of rows are tokens of the prompt; audio is left as it is."""

    family = "Apertus 1.5"
    classes: ClassVar[tuple[str, ...]] = ("Apertus1p5ForConditionalGeneration", "Apertus1p5Model")
    image_delimiters = (1, 1)
    other_tokens = ("audio_token_id",)
    row_ends = False

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vision_tokenizer

    def side(self, trunk: Any) -> int:
        return int(trunk.config.vision_config.spatial_scale_factor)
