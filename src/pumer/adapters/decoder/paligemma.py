"""PaliGemma and Gemma 3 (Beyer et al., 2024; Gemma Team, 2025) as transformers has them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each, pool_squares, tower_layers
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Grid


@register
class PaliGemmaAdapter(DecoderAdapter):
    """Every token of the prompt sees every other."""

    family = "PaliGemma"
    classes: ClassVar[tuple[str, ...]] = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")
    projects_tokens = True
    causal = False

    def tower_attention(self, model: nn.Module) -> Any:
        return tower_layers(self.trunk(model).vision_tower)[-1].self_attn

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        return one_span_each(
            output.pooler_output, self.default_grid(trunk), self.vision_facts(trunk, captured)
        )


@register
class Gemma3Adapter(PaliGemmaAdapter):
    """Image tokens see each other, text those before it, most layers within a window; patches are
    averaged by 4 x 4."""

    family = "Gemma 3"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration", "Gemma3Model")
    projects_tokens = False  # it averages them
    causal = True
    image_delimiters = (1, 1)

    def default_grid(self, model: nn.Module) -> Grid:
        side = round(config_of(model).mm_tokens_per_image ** 0.5)
        return side, side

    def patches_per_token(self, model: nn.Module) -> int:
        vision = config_of(model).vision_config
        return int(
            (vision.image_size // vision.patch_size) ** 2 // config_of(model).mm_tokens_per_image
        )

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        rows, columns = self.default_grid(trunk)
        return pool_squares(vision_features(captured), rows * columns)
