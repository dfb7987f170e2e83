"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (Wang et al., 2024; Bai et al., 2025) as transformers has them.

Positions are three-dimensional, and decoding goes on from an offset that the model keeps itself:
neither changes, as the model goes on counting every token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from pumer.adapters.base import Patch, config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import VisionCapture, attention_of, received_in_middle
from pumer.reducers.tokens import Encoder, Grid


@register
class QwenVLAdapter(DecoderAdapter):
    """Images of any size, four patches to a token; no [CLS]; videos are left as they are."""

    family = "Qwen-VL"
    classes: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLModel",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
    )
    renumbers = False  # an image token has three: time, row and column
    image_delimiters = (1, 1)
    on_host = ("image_grid_thw",)

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).visual.merger

    def tower_attention(self, model: nn.Module) -> Any:
        # The last block; in Qwen2.5-VL the last one that sees the whole image.
        attentions = self.tower_attentions(model)
        return attentions[max(attentions)]

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        blocks = self.trunk(model).visual.blocks
        full = getattr(config_of(model).vision_config, "fullatt_block_indexes", None)
        return {index + 1: blocks[index].attn for index in sorted(full or range(len(blocks)))}

    def vision(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).visual

    def patches_per_token(self, model: nn.Module) -> int:
        return int(config_of(model).vision_config.spatial_merge_size ** 2)

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        patch.hook(self.trunk(model).visual.register_forward_pre_hook(_to_device, with_kwargs=True))

    def default_grid(self, model: nn.Module) -> Grid:
        return DEFAULT_GRID

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        merge = trunk.visual.spatial_merge_size
        frames = captured.inputs["image_grid_thw"]
        grids = [(rows // merge, columns // merge) for _, rows, columns in frames.tolist()]
        encoders = self._known(
            trunk, frames, captured, [len(features) for features in output.pooler_output]
        )
        return [
            ImageSpan(
                len(features), None, grid if grid[0] * grid[1] == len(features) else None, encoder
            )
            for features, grid, encoder in zip(output.pooler_output, grids, encoders, strict=True)
        ]

    def _known(
        self, trunk: Any, frames: Tensor, captured: Captured, lengths: list[int]
    ) -> list[Encoder | None]:
        """What the tower knows of every image's tokens, each the mean of its four patches."""
        features, heads = captured.features_RPD, captured.heads
        if not captured.needs:
            return [None] * len(lengths)
        group = trunk.visual.spatial_merge_size**2
        back = torch.arange(sum(lengths))
        if hasattr(trunk.visual, "window_size"):  # patches stand in the order of windows
            back = get_vision_window_index(
                frames,
                trunk.visual.spatial_merge_size,
                trunk.visual.window_size,
                trunk.visual.patch_size,
            )[0].argsort()
        # Chunks of the sequence are given one by one, or all in one.
        wide, middle = (
            [torch.cat(part, 2) for part in zip(*captures, strict=True)]
            for captures in (heads, captured.middle_heads or heads)
        )
        encoders: list[Encoder | None] = []
        for image_index, length in enumerate(lengths):
            start = sum(lengths[:image_index])
            # An image's tokens are a stretch of the sequence in either order.
            stretch = slice(start * group, (start + length) * group)
            facts = {} if features is None else {"features_BND": features[None, stretch]}
            if heads:
                queries, keys = (part[:, :, stretch] for part in wide)
                facts |= attention_of(captured.needs, queries, keys, first=False)
                queries, keys = (part[:, :, stretch] for part in middle)
                facts |= received_in_middle(captured.needs, queries, keys, first=False)
            order = (back[start : start + length] - start).to(trunk.visual.device)
            encoders.append(
                Encoder(
                    **{
                        name: facts[name].unflatten(1, (length, group)).mean(2)[:, order]
                        for name in captured.needs
                    }
                )
            )
        return encoders


DEFAULT_GRID = (24, 24)
"""Rows and columns of tokens of an image of 672 pixels on a side."""


def _to_device(visual: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The tower's grids, which the host has read, back on the device of the pixels."""
    pixels = args[0] if args else kwargs["hidden_states"]
    return args, {
        name: value.to(pixels.device) if name == "grid_thw" else value
        for name, value in kwargs.items()
    }
