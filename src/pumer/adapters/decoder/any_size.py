"""Families whose images may have any size: the tower takes the patches of all images in one row, or
each image's in a row of its own with padding behind them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import VisionCapture, attention_of, received_in_middle
from pumer.reducers.tokens import Encoder, Grid

DEFAULT_GRID = (24, 24)
"""Rows and columns of tokens of an image of 672 pixels on a side."""


class AnySizeAdapter(DecoderAdapter):
    """Squares of patches make a token; no [CLS]; videos are left as they are.

    As it is, it fits families whose processor gives `image_grid_thw`, such as Qwen-VL.
    """

    on_host: ClassVar[tuple[str, ...]] = ("image_grid_thw",)
    grouped = True
    padded: ClassVar[bool] = False
    """Whether every image is a row of its own in the tower."""

    def patches_per_token(self, model: nn.Module) -> int:
        vision = config_of(model).vision_config
        return int(getattr(vision, "spatial_merge_size", 1) ** 2)

    def default_grid(self, model: nn.Module) -> Grid:
        return DEFAULT_GRID

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        tower = self.vision(model)
        patch.hook(tower.register_forward_pre_hook(_to_device, with_kwargs=True))

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        """Rows and columns of tokens of every image."""
        side = math.isqrt(self.patches_per_token(trunk))
        frames = captured.inputs["image_grid_thw"].tolist()
        return [(rows // side, columns // side) for _, rows, columns in frames]

    def tower_grids(self, trunk: Any, captured: Captured) -> list[Grid] | None:
        return None if self.padded else self.token_grids(trunk, captured)

    def tower_prefix(self, model: nn.Module) -> int:
        """Tokens before the patches of every image in the tower, where images lie in one row."""
        return 0

    def structure(self, grid: Grid) -> Tensor | None:
        """Which of the placeholders of an image are no patches, bool [N]; None where all are."""
        return None

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        grids, spans = self.token_grids(trunk, captured), []
        for grid, features in zip(grids, output.pooler_output, strict=True):
            span = ImageSpan(len(features), self.structure(grid))
            fills_grid = grid[0] * grid[1] == span.num_patches
            spans.append(replace(span, grid=grid if fills_grid else None))
        patches = [span.num_patches for span in spans]
        encoders = self._encoders(trunk, captured, grids, patches)
        return [
            replace(span, encoder=encoder) for span, encoder in zip(spans, encoders, strict=True)
        ]

    def _encoders(
        self, trunk: Any, captured: Captured, grids: list[Grid], lengths: list[int]
    ) -> list[Encoder | None]:
        """What the tower knows of every image's tokens, each the mean of its patches."""
        if not captured.needs:
            return [None] * len(lengths)
        order = self.token_order(trunk, captured)
        # Images may go through the projector one by one.
        features = torch.cat(captured.features, -2) if captured.features else None
        heads = captured.heads
        middle_heads = captured.middle_heads or heads
        # Chunks of the sequence are given one by one, or all in one.
        wide, middle = (
            [torch.cat(part, 2) for part in zip(*captures, strict=True)]
            for captures in (heads, middle_heads)
        )
        group, prefix = self.patches_per_token(trunk), self.tower_prefix(trunk)
        if heads and not self.padded:
            group = (wide[0].shape[2] - prefix * len(lengths)) // sum(lengths)
        encoders: list[Encoder | None] = []
        for image_index, (grid, length) in enumerate(zip(grids, lengths, strict=True)):
            start = sum(lengths[:image_index])
            facts = {}
            if features is not None:
                # An image's tokens are a stretch of the sequence, in any order. Some families
                # gather the patches of a token before the projector, in the prompt's order.
                per_token = features[..., 0].numel() // sum(lengths)
                stretch = slice(start * per_token, (start + length) * per_token)
                facts["features_BND"] = features.flatten(0, -2)[None, stretch]
            if heads:
                row = slice(image_index, image_index + 1) if self.padded else slice(None)
                first = 0 if self.padded else start * group + image_index * prefix
                behind = first + prefix + length * group
                queries, keys = (part[row, :, first:behind] for part in wide)
                facts |= attention_of(captured.needs, queries, keys, prefix)
                queries, keys = (part[row, :, first:behind] for part in middle)
                facts |= received_in_middle(captured.needs, queries, keys, prefix)
            token_facts = {}
            for name in captured.needs:
                value = facts[name]
                if value.shape[1] != length:
                    value = value if self.grouped else _in_order(value, order, start * group)
                    value = self._per_token(value, grid, value.shape[1] // length)
                    value = _in_order(value, order, start) if self.grouped else value
                token_facts[name] = value
            encoders.append(Encoder(**token_facts))
        return encoders

    def _per_token(self, value: Tensor, grid: Grid, group: int) -> Tensor:
        if self.grouped:
            return value.unflatten(1, (-1, group)).mean(2)
        (rows, columns), side = grid, math.isqrt(group)
        return value.unflatten(1, (rows, side, columns, side)).mean((2, 4)).flatten(1, 2)


def _in_order(value: Tensor, order: Tensor | None, first: int) -> Tensor:
    """What is known of an image's tokens [1,I,...], the first of which is that of this index."""
    if order is None:
        return value
    index = order[first : first + value.shape[1]] - first
    return value[:, index.to(value.device)]


def _to_device(tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the host has read, back on the device of the pixels."""
    pixels = next(
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and value.is_floating_point()
    )
    return args, {
        name: value.to(pixels.device) if isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
