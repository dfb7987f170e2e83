"""Molmo 2 (Ai2, 2025) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.parts import ATTENTION, named, tower_layers
from pumer.adapters.decoder.prompt import ImageSpan, join_spans
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Encoder


@register
class Molmo2Adapter(DecoderAdapter):
    """An image is a small view and a large one made of crops; every token pools the patches that
    come with it by index. Tokens of the prompt mark both views and the ends of their rows."""

    family = "Molmo 2"
    classes: ClassVar[tuple[str, ...]] = ("Molmo2ForConditionalGeneration", "Molmo2Model")
    renumbers = False  # some layers scale the rotary embeddings, others do not
    image_delimiters = (0, 1)
    other_tokens = ()  # videos have the placeholder of images
    structure_tokens = (
        "image_start_token_id",
        "low_res_image_start_token_id",
        "image_end_token_id",
    )
    on_host = ("image_grids",)

    def patches_per_token(self, model: nn.Module) -> int:
        return 4

    def tower_attention(self, model: nn.Module) -> Any:
        layers = tower_layers(self.vision(model))
        used = config_of(model).adapter_config.vision_feature_layer
        return named(layers[max(index % len(layers) for index in used)], ATTENTION)

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        """Of the tokens of all images in a row, each the mean of its patches."""
        index_TP = captured.inputs["image_token_pooling"]
        index_TP = index_TP[(index_TP >= 0).any(1)]
        share_TP = (index_TP >= 0).float()
        share_TP = share_TP / share_TP.sum(1, keepdim=True)
        facts = {}
        for name, value in vision_features(captured).items():
            by_patch = value.flatten() if name.endswith("_BN") else value.flatten(0, -2)
            patches = by_patch[index_TP.clamp_min(0)]
            facts[name] = torch.einsum("tp...,tp->t...", patches, share_TP.to(patches))[None]
        return facts

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        facts, images, first = self.vision_facts(trunk, captured), [], 0
        for sides in captured.inputs["image_grids"].tolist():
            views = []
            for grid in (tuple(sides[:2]), tuple(sides[2:])):
                last = first + grid[0] * grid[1]
                view_facts = {name: value[:, first:last] for name, value in facts.items()}
                encoder = Encoder(**view_facts) if facts else None
                views.append(ImageSpan(last - first, None, grid, encoder))
                first = last
            images.append(join_spans([view for view in views if view.length]))
        return images
