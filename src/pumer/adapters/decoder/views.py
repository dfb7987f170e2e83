"""DeepSeek-OCR 2 and Step 3.7 (DeepSeek, StepFun, 2026) as transformers has them: an image is
crops and a view of the whole behind them, for each of which the tower runs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each, pool_squares
from pumer.adapters.decoder.prompt import ImageSpan, join_spans
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Grid


class ViewsAdapter(DecoderAdapter):
    """The whole goes through the tower first, and comes last in the prompt."""

    on_host = ("num_local_patches",)
    separators: ClassVar[int] = 0
    """Placeholders behind the whole that are no patches."""

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        num_crops = self.num_crops(captured)
        length = output.last_hidden_state.shape[1]
        structure = torch.arange(length + self.separators) >= length
        overviews = self._view(trunk, captured, 0, [structure] * len(num_crops))
        others = [len(features) - len(structure) for features in output.pooler_output]
        crops = [
            torch.zeros(others[image] // count, dtype=torch.bool)
            for image, count in enumerate(num_crops)
            for _ in range(count)
        ]
        crop_spans = iter(self._view(trunk, captured, 1, crops))
        return [
            join_spans([*(next(crop_spans) for _ in range(count)), overview])
            for overview, count in zip(overviews, num_crops, strict=True)
        ]

    def num_crops(self, captured: Captured) -> list[int]:
        """How many crops every image has besides the whole."""
        counts = captured.inputs.get("num_local_patches")
        if counts is None:
            return [0] * len(captured.inputs["pixel_values"])
        return [int(count) for count in counts]

    def _view(
        self, trunk: Any, captured: Captured, index: int, structures: list[Tensor]
    ) -> list[ImageSpan]:
        """The spans of what went through the tower at one time."""
        if not structures:
            return []
        structure = structures[0]
        length = int((~structure).sum())
        side = math.isqrt(length)
        grid = (side, side) if self.reads_tower and side**2 == length else None
        facts = vision_features(captured.of_view(index), self.has_class_token(trunk))
        facts = pool_squares(facts, length)
        return one_span_each(structures, grid, facts, structure if structure.any() else None)


@register
class Step3p7Adapter(ViewsAdapter):
    """Two convolutions make a token of 4 x 4 patches; tokens around every crop mark its ends."""

    family = "Step 3.7"
    classes: ClassVar[tuple[str, ...]] = ("Step3p7ForConditionalGeneration", "Step3p7Model")
    image_delimiters = (1, 1)

    def patches_per_token(self, model: nn.Module) -> int:
        return 16


@register
class DeepseekOcr2Adapter(ViewsAdapter):
    """Tokens are learned queries that look at all patches: they have no places in the image; one
    behind them separates images."""

    family = "DeepSeek-OCR 2"
    classes: ClassVar[tuple[str, ...]] = (
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Model",
    )
    separators = 1
    reads_tower = False

    def default_grid(self, model: nn.Module) -> Grid:
        return 1, self.vision(model).query_1024_resolution.num_embeddings

    def patches_per_token(self, model: nn.Module) -> int:
        return 16  # of SAM's, where nearly all its work is

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        sam = config_of(model).vision_config.sam_config
        return sam.num_hidden_layers, sam.hidden_size, sam.num_attention_heads
