"""LFM2-VL and LFM3-VL (Liquid AI, 2025 and 2026) as transformers has them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid


@register
class Lfm2VlAdapter(AnySizeAdapter):
    """Every tile of a large image is an image, with a token before it that says which."""

    family = "LFM2-VL"
    classes: ClassVar[tuple[str, ...]] = ("Lfm2VlForConditionalGeneration", "Lfm2VlModel")
    image_delimiters = (1, 1)
    on_host = ()
    grouped = False
    padded = True

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).downsample_factor ** 2)

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        side = config_of(trunk).downsample_factor
        shapes = captured.inputs["spatial_shapes"].tolist()
        return [(rows // side, columns // side) for rows, columns in shapes]

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        if captured.features_RPD is not None:
            # The projector gets squares of patches side by side, as many for every image.
            side, images = config_of(trunk).downsample_factor, output.pooler_output
            squares = captured.features_RPD[0].unflatten(1, (len(images), -1, side)).mean((0, 3))
            tokens = [square[: len(image)] for square, image in zip(squares, images, strict=True)]
            captured.features = [torch.cat(tokens)[None]]
        return super().image_spans(trunk, output, captured)


@register
class Lfm3VlAdapter(AnySizeAdapter):
    """Layers of the tower that only convolve have no attention to be read."""

    family = "LFM3-VL"
    classes: ClassVar[tuple[str, ...]] = ("Lfm3VlForConditionalGeneration", "Lfm3VlModel")
    image_delimiters = (1, 1)

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        _, width, heads = super().tower_shape(model)
        return len(self.tower_attentions(model)), width, heads

    def tower_attention(self, model: nn.Module) -> Any:
        attentions = self.tower_attentions(model)
        return attentions[max(attentions)]

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        return {
            index + 1: layer.self_attn
            for index, layer in enumerate(self.vision(model).layers)
            if hasattr(layer, "self_attn")
        }
