"""Fuyu (Bavishi et al., 2023) and Chameleon (Meta, 2024) as transformers has them: images become
tokens without a tower of transformer layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers.tokens import Grid


class WithoutTower(DecoderAdapter):
    """What makes the tokens is counted as a projector."""

    reads_tower = False

    def vision(self, model: nn.Module) -> Any:
        return self.projector(model)

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return 0, 1, 1


@register
class FuyuAdapter(WithoutTower):
    """A token of the prompt behind every row of an image says that it ends."""

    family = "Fuyu"
    classes: ClassVar[tuple[str, ...]] = ("FuyuForCausalLM", "FuyuModel")
    image_delimiters = (0, 1)

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vision_embed_tokens

    def default_grid(self, model: nn.Module) -> Grid:
        side = config_of(model).image_size // config_of(model).patch_size
        return side, side

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        return one_span_each(output.last_hidden_state, None, {})


@register
class ChameleonAdapter(WithoutTower):
    """Images are words of a visual vocabulary."""

    family = "Chameleon"
    classes: ClassVar[tuple[str, ...]] = ("ChameleonForConditionalGeneration", "ChameleonModel")
    image_delimiters = (1, 1)

    def language(self, model: nn.Module) -> Any:
        return self.trunk(model)

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).vqmodel

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).vq_config
        side = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)
        return side, side

    def placeholder_mask(
        self, trunk: Any, input_ids: Tensor | None, embeddings: Tensor
    ) -> tuple[Tensor, ...]:
        token = trunk.vocabulary_mapping.image_token_id
        return (self._is(trunk, token, input_ids, embeddings),)
