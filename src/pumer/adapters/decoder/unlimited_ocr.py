"""Unlimited-OCR (Baidu, 2026) as transformers has it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.parts import ATTENTION, named
from pumer.adapters.decoder.prompt import ImageSpan, join_spans
from pumer.adapters.decoder.views import ViewsAdapter
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Encoder, Grid


@register
class UnlimitedOcrAdapter(ViewsAdapter):
    """An image is one grid of all crops and one of the whole, with a placeholder behind every row
    and one at the end. What the model writes sees the prompt and a window."""

    family = "Unlimited-OCR"
    classes: ClassVar[tuple[str, ...]] = (
        "UnlimitedOcrForConditionalGeneration",
        "UnlimitedOcrModel",
    )

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def default_grid(self, model: nn.Module) -> Grid:
        sam = config_of(model).vision_config.sam_config
        return (sam.image_size // sam.patch_size // 4,) * 2

    def patches_per_token(self, model: nn.Module) -> int:
        return 16  # of SAM's, where much of its work is

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        sam = config_of(model).vision_config.sam_config
        return sam.num_hidden_layers, sam.hidden_size, sam.num_attention_heads

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        layers = self.vision(model).vision_encoder.encoder.layers
        return {index + 1: named(layer, ATTENTION) for index, layer in enumerate(layers)}

    def tower_attention(self, model: nn.Module) -> Any:
        attentions = self.tower_attentions(model)
        return attentions[max(attentions)]

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        num_crops, images, first = self.num_crops(captured), [], 0
        overviews = vision_features(captured.of_view(0), True)
        crops = vision_features(captured.of_view(1), True) if any(num_crops) else {}
        for image_index, count in enumerate(num_crops):
            views = []
            if count:
                columns, rows = map(int, captured.inputs["patches_grid"][image_index])
                side = math.isqrt(output.local_last_hidden_state.shape[1])
                facts = {name: value[first : first + count] for name, value in crops.items()}
                views.append(_rows((rows * side, columns * side), facts, (rows, columns)))
                first += count
            side = math.isqrt(output.last_hidden_state.shape[1])
            facts = {name: value[image_index, None] for name, value in overviews.items()}
            views.append(_rows((side, side), facts, (1, 1), separators=1))
            images.append(join_spans(views))
        return images


def _rows(grid: Grid, facts: dict[str, Tensor], crops: Grid, separators: int = 0) -> ImageSpan:
    """Rows that end with a placeholder, of a grid that is put together of crops [R,P,...]."""
    rows, columns = grid
    index = torch.arange(rows * (columns + 1) + separators)
    structure = (index % (columns + 1) == columns) | (index >= rows * (columns + 1))
    sides = (*crops, rows // crops[0], columns // crops[1])
    raster = {
        name: value.flatten(0, 1).unflatten(0, sides).transpose(1, 2).flatten(0, 3)[None]
        for name, value in facts.items()
    }
    return ImageSpan(len(index), structure, grid, Encoder(**raster) if raster else None)
