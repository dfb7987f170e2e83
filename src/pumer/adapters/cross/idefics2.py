"""Idefics2 (Laurençon et al., 2024) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.family import CrossAdapter
from pumer.adapters.cross.reader import Inputs
from pumer.reducers.tokens import Grid


@register
class Idefics2Adapter(CrossAdapter):
    """A perceiver reads every image, or crop, whose patches may be padded, and gives the language
    model 64 tokens, whose number stays. What leaves is not projected either."""

    family = "Idefics2"
    classes: ClassVar[tuple[str, ...]] = ("Idefics2ForConditionalGeneration", "Idefics2Model")
    memory = "image_hidden_states"
    mask = "attention_mask"
    padded = True
    crossing = ("self_attn",)
    queries_are_keys = projects_remaining = True

    def readers(self, model: nn.Module) -> list[nn.Module]:
        return [self.trunk(model).connector]

    def scopes(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(self.trunk(model), "get_image_features")]

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(self.trunk(model).connector.perceiver_resampler.layers)

    def projector(self, model: nn.Module) -> nn.Module:
        projector: nn.Module = self.trunk(model).connector.modality_projection
        return projector

    def writer(self, model: nn.Module) -> Any:
        return self.language(model)

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        _, image = super().default_lengths(model)
        return config_of(model).perceiver_config.resampler_n_latents, image

    def text_length(self, model: nn.Module, inputs: Inputs) -> int:
        return self.default_lengths(model)[0]

    def grids(
        self, model: nn.Module, token_rows: Sequence[Tensor], inputs: Inputs
    ) -> list[Grid | None]:
        """Padding is on two sides of an image, so that its patches are a rectangle."""
        width = inputs["pixel_values"].shape[-1] // config_of(model).vision_config.patch_size
        grids = [
            (len((index_I // width).unique()), len((index_I % width).unique()))
            for index_I in token_rows
        ]
        return [
            grid if grid[0] * grid[1] == len(index_I) else None
            for grid, index_I in zip(grids, token_rows, strict=True)
        ]
