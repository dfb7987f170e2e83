"""METER's processor: texts and images to model inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class MeterProcessor(ProcessorMixin):
    """A tokenizer (RoBERTa's) and an image processor (CLIP's, see `square_images`) in one.

    Called with `text` and `images`, it returns `input_ids`, `attention_mask` and `pixel_values`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)


class MeterImageProcessor(CLIPImageProcessorPil):
    """The image processor of the original METER: resize the shorter side to `size`, crop the
    center.

    CLIP's processor does the same but rounds the center down; METER was trained with torchvision's
    rounding.
    """

    size = {"height": 224, "width": 224}  # noqa: RUF012  # as all of them have it
    do_center_crop = False

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs: Any
    ) -> np.ndarray:
        shorter = SizeDict(shortest_edge=min(size.height, size.width))
        resized = super().resize(image, shorter, resample, **kwargs)
        _, height, width = resized.shape
        top, left_edge = round((height - size.height) / 2), round((width - size.width) / 2)
        cut: np.ndarray = resized[:, top : top + size.height, left_edge : left_edge + size.width]
        return cut


def square_images(size: int) -> CLIPImageProcessorPil:
    """CLIP's image processor as in PuMer: resize to `size` x `size` pixels, without a crop.

    Bicubic, with CLIP's mean and standard deviation. It needs Pillow; transformers' default needs
    torchvision.
    """
    return CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)
