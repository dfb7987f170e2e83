"""Idefics (Laurençon et al., 2023), the first one, as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.family import CrossAdapter
from pumer.adapters.cross.reader import Inputs


@register
class IdeficsAdapter(CrossAdapter):
    """A perceiver reads every image, and layers of the language model what it gives, whose number
    stays. It takes no mask."""

    family = "Idefics"
    classes: ClassVar[tuple[str, ...]] = ("IdeficsForVisionText2Text", "IdeficsModel")
    memory = "context"
    mask = None
    heeds_mask = False
    crossing = ("0",)
    queries_are_keys = True

    def readers(self, model: nn.Module) -> list[nn.Module]:
        return [self.trunk(model).perceiver_resampler]

    def depth(self, model: nn.Module) -> int:
        if not config_of(model).use_resampler:
            raise ValueError(
                f"this {type(model).__name__} has use_resampler=False: its language model reads "
                "all patches itself, which is not covered. Take one with a resampler"
            )
        return super().depth(model)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(self.trunk(model).perceiver_resampler.blocks)

    def writer(self, model: nn.Module) -> Any:
        trunk = self.trunk(model)
        return nn.ModuleList([trunk.layers, trunk.gated_cross_attn_layers])

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        _, image = super().default_lengths(model)
        return config_of(model).perceiver_config.resampler_n_latents, image

    def text_length(self, model: nn.Module, inputs: Inputs) -> int:
        return self.default_lengths(model)[0]

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        vision = config_of(model).vision_config
        return vision.num_hidden_layers, vision.embed_dim, vision.num_attention_heads
