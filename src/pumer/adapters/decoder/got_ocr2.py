"""GOT-OCR 2.0 (Wei et al., 2024) as transformers has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pumer.adapters.base import register
from pumer.adapters.decoder.family import DecoderAdapter


@register
class GotOcr2Adapter(DecoderAdapter):
    """A page is one crop or several; two convolutions make a token of 4 x 4 patches of SAM's
    tower, whose attention has biases of its own."""

    family = "GOT-OCR 2"
    classes: ClassVar[tuple[str, ...]] = ("GotOcr2ForConditionalGeneration", "GotOcr2Model")
    image_delimiters = (1, 1)
    crop_gap = 0
    reads_tower = False

    def patches_per_token(self, model: nn.Module) -> int:
        return 16
