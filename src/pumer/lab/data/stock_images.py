"""Image transforms of transformers' image processors.

The processor itself does the work, so that every setting in its file has its usual effect. Settings
that equal one of our transforms become that transform, which supports other sizes and images of any
shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from pumer.lab.data.images import Crop, KeepAspect, Square, crop_ends
from pumer.models.meter import MeterImageProcessor

_PROBES = ((64, 48), (40, 80))
"""Sizes of two images of different aspect ratios."""


@dataclass(frozen=True)
class Stock:
    """An image processor of transformers, applied to an RGB image: float32 [3, H, W].

    `settings` are those in its file. Raises ValueError for an image that the processor rejects.
    """

    settings: dict[str, Any]
    processor: Any = field(compare=False, repr=False)

    def __call__(self, image: Image.Image) -> Tensor:
        shorter = self.processor.size.shortest_edge if self.processor.do_resize else None
        if shorter and self.processor.do_center_crop:
            crop = self.processor.crop_size
            side = max(crop.height or 0, crop.width or 0, crop.shortest_edge or 0)
            image = crop_ends(image, side / shorter)
        try:
            pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise ValueError(
                f"{type(self.processor).__name__} cannot take an image of {image.width} x "
                f"{image.height} pixels: {_reason(error)}; leave the image out."
            ) from error
        return pixels.float()


def read_processor(
    directory: str | Path, settings: dict[str, Any]
) -> Square | Crop | KeepAspect | Stock:
    """The transform of the image processor in a folder; `settings` are what its file holds.

    Raises ValueError for settings that transformers cannot read or carry out, and for those that
    keep the aspect ratio, unless the processor is ViLT's.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(
            str(directory), backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers makes of wrong settings
        raise ValueError(
            f"{directory}: transformers makes no image processor of its settings "
            f"({_reason(error)}); save the model's processor there again, or name its "
            "image_processor_type."
        ) from error
    try:
        transform = _ours(processor) or Stock(settings, processor)
        shapes = {transform(Image.new("RGB", size)).shape for size in _PROBES}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}: the settings of its {type(processor).__name__} do not fit each other: "
            f"{_reason(error.__cause__ or error)}; save the model's processor there again."
        ) from error
    if any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
        raise ValueError(
            f"{directory}: {type(processor).__name__} makes {sorted(map(tuple, shapes))} of an "
            "image, not [3, height, width]; give the model a processor that takes an image as a "
            "whole."
        )
    if len(shapes) > 1 and not isinstance(processor, ViltImageProcessorPil):
        raise ValueError(
            f"{directory} keeps the images' aspect ratio (size {dict(processor.size)}), which the "
            "model cannot take: set do_center_crop and crop_size, or height and width in size."
        )
    return transform


def _reason(error: BaseException) -> str:
    """An error of transformers, shortened to its gist."""
    return re.split(r"[.\n]* (?:Got|Should have)", str(error).strip())[0][:300]


def _ours(processor: Any) -> Square | Crop | KeepAspect | None:
    """The equivalent transform of ours, if there is one."""
    plain = processor.do_resize and processor.do_rescale and processor.do_normalize
    if not plain or not abs(255 * processor.rescale_factor - 1) < 1e-6:
        return None
    size, side = processor.size, processor.size.height
    shared: dict[str, Any] = {
        "resample": Resampling.BILINEAR
        if processor.resample is None
        else Resampling(processor.resample),
        "mean": _three(processor.image_mean),
        "std": _three(processor.image_std),
    }
    if isinstance(processor, ViltImageProcessorPil):
        shorter, multiple = size.shortest_edge, processor.size_divisor
        return KeepAspect(shorter, multiple=multiple, **shared) if shorter else None
    if isinstance(processor, MeterImageProcessor):
        return Crop(side, **shared) if side == size.width else None
    steps = ("process_image", "_preprocess", "resize", "center_crop", "rescale", "normalize")
    stock = all(getattr(type(processor), name) is getattr(PilBackend, name) for name in steps)
    crop = processor.crop_size if processor.do_center_crop else size
    square = side and {side} == {size.width, crop.height, crop.width}
    return Square(side, **shared) if stock and square and not processor.do_pad else None


def _three(values: Any) -> tuple[float, float, float]:
    """A value for each channel; transformers also takes a single one for all."""
    red, green, blue = [values] * 3 if isinstance(values, int | float) else values
    return float(red), float(green), float(blue)
