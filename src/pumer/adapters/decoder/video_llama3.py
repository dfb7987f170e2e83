"""VideoLLaMA 3 (Zhang et al., 2025) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from pumer.adapters.base import register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.reducers.tokens import Grid


@register
class VideoLlama3Adapter(AnySizeAdapter):
    """How many patches make a token is said with every image."""

    family = "VideoLLaMA 3"
    classes: ClassVar[tuple[str, ...]] = ("VideoLlama3ForConditionalGeneration", "VideoLlama3Model")
    on_host = ("image_grid_thw", "image_merge_sizes")

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        frames = captured.inputs["image_grid_thw"].tolist()
        sides = captured.inputs["image_merge_sizes"].tolist()
        return [
            (rows // side, columns // side)
            for (_, rows, columns), side in zip(frames, sides, strict=True)
        ]
