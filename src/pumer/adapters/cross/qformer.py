"""BLIP-2 (Li et al., 2023) and InstructBLIP (Dai et al., 2023) as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.family import CrossAdapter
from pumer.adapters.cross.reader import Inputs
from pumer.adapters.decoder.parts import DEFAULT_TEXT

SCOPES = (
    "forward",
    "generate",
    "get_image_features",
    "get_video_features",
    "get_qformer_features",
)


@register
class QFormerAdapter(CrossAdapter):
    """A Q-former reads every image, or frame of a video, and gives the language model a few dozen
    tokens, whose number stays."""

    family = "BLIP-2"
    classes: ClassVar[tuple[str, ...]] = (
        "Blip2ForConditionalGeneration",
        "Blip2ForImageTextRetrieval",
        "Blip2Model",
        "InstructBlipForConditionalGeneration",
        "InstructBlipModel",
        "InstructBlipVideoForConditionalGeneration",
        "InstructBlipVideoModel",
    )

    def readers(self, model: Any) -> list[nn.Module]:
        return [model.qformer]

    def scopes(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(model, name) for name in SCOPES if hasattr(model, name)]

    def layers(self, model: Any) -> Sequence[nn.Module]:
        return list(model.qformer.encoder.layer)

    def writer(self, model: nn.Module) -> Any:
        return getattr(model, "language_model", None)

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        _, image = super().default_lengths(model)
        return config_of(model).num_query_tokens, image

    def text_length(self, model: nn.Module, inputs: Inputs) -> int:
        queries = inputs.get("query_embeds")
        return DEFAULT_TEXT if queries is None else queries.shape[1]
