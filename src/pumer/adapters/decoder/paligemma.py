"""PaliGemma and Gemma 3 (Beyer et al., 2024; Gemma Team, 2025) as transformers has them."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class PaliGemmaAdapter(DecoderAdapter):
    """Every token of the prompt sees every other."""

    family = "PaliGemma"
    classes: ClassVar[tuple[str, ...]] = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")
    projects_tokens = True
    causal = False
    merges_in_tower = True


@register
class Gemma3Adapter(DecoderAdapter):
    """Image tokens see each other, text those before it, most layers within a window; patches are
    averaged by 4 x 4."""

    family = "Gemma 3"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration", "Gemma3Model")
    image_delimiters = (1, 1)
    merges_in_tower = True

    def patches_per_token(self, model: nn.Module) -> int:
        vision = config_of(model).vision_config
        return int(
            (vision.image_size // vision.patch_size) ** 2 // config_of(model).mm_tokens_per_image
        )
