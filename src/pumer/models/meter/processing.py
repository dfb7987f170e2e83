"""METER's processor: texts and pictures to what the model reads."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class MeterProcessor(ProcessorMixin):
    """A tokenizer (RoBERTa's) and an image processor (CLIP's, see `square_images`) in one.

    Called with `text` and `images` it gives `input_ids`, `attention_mask` and `pixel_values`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)


def square_images(size: int) -> CLIPImageProcessorPil:
    """CLIP's image processor as PuMer has it: pictures are stretched to `size` x `size` pixels, nothing is cut off.

    Bicubic, CLIP's mean and standard deviation. It needs Pillow alone, where transformers' default needs torchvision.
    """
    return CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)
