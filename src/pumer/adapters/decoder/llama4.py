"""Llama 4 (Meta, 2025) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.prompt import ImageSpan, current_state
from pumer.adapters.decoder.vision import VisionCapture
from pumer.adapters.macs import linear_weights


@register
class Llama4Adapter(DecoderAdapter):
    """An image is a grid of crops and a thumbnail at the end; the tower has its [CLS] at the end;
    layers without rotary embeddings count positions themselves."""

    family = "Llama 4"
    classes: ClassVar[tuple[str, ...]] = ("Llama4ForConditionalGeneration",)
    renumbers = False  # they would go on counting
    image_delimiters = (2, 1)
    crop_gap = 1

    def language(self, model: nn.Module) -> Any:
        return self.trunk(model).language_model.model

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).vision_adapter

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def patches_per_token(self, model: nn.Module) -> int:
        return round(1 / config_of(model).vision_config.pixel_shuffle_ratio) ** 2

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision, projection = super().vision_macs(model, image, tower)
        second = linear_weights(self.trunk(model).multi_modal_projector)
        return vision, projection + image * second

    def head_macs(self, model: nn.Module) -> int:
        return linear_weights(self.trunk(model).language_model.lm_head)

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        for heads in (captured.heads, captured.middle_heads):
            heads[:] = [(queries.roll(1, 2), keys.roll(1, 2)) for queries, keys in heads]
        return super().vision_facts(trunk, captured)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        facts = self.vision_facts(trunk, captured)
        return one_span_each(output.last_hidden_state, self.default_grid(trunk), facts)

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        for layer_index, layer in enumerate(self.layers(model)):
            attention: Any = layer.self_attn
            if attention.attn_temperature_tuning and not attention.use_rope:
                patch.set(attention, "attn_temperature_tuning", False)
                scale = partial(_scaled, attention, layer_index)
                patch.hook(attention.q_proj.register_forward_hook(scale))


def _scaled(
    attention: Any, layer_index: int, _: nn.Module, args: Any, queries_BKD: Tensor
) -> Tensor:
    """Queries scaled by their positions as the model counts them; it would count those left."""
    batch, length = queries_BKD.shape[:2]
    state = current_state()
    if state is None:
        position_BK = torch.arange(length, device=queries_BKD.device)[None]
    else:
        layout = state.layouts[layer_index] if state.layouts else None
        position_BK = state.positions_of(layout, batch, queries_BKD.device)[0]
    steps_BK = ((position_BK.float() + 1) / attention.floor_scale).floor()
    scale_BK = torch.log1p(steps_BK) * attention.attn_scale + 1
    return (queries_BKD * scale_BK[..., None]).to(queries_BKD.dtype)
