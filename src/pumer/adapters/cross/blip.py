"""BLIP (Li et al., 2022) as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.cross.writer import WriterAdapter


@register
class BlipAdapter(WriterAdapter):
    """Captions are written by a decoder that reads the image; questions and captions to be matched
    are read by an encoder that does."""

    family = "BLIP"
    classes: ClassVar[tuple[str, ...]] = (
        "BlipForConditionalGeneration",
        "BlipForImageTextRetrieval",
        "BlipForQuestionAnswering",
    )
    reads_tower = False
    heeds_mask = False  # its layers hand the mask to where cross-attention does not look

    def readers(self, model: Any) -> list[nn.Module]:
        return [getattr(model, "text_encoder", None) or model.text_decoder]

    def has_class_token(self, model: nn.Module) -> bool:
        return True
