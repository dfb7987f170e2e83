"""RandAugment as ViLT, METER and PuMer train with it.

Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space",
2020. Written out here
because torchvision, which is no dependency, has other operations and strengths: no `SolarizeAdd`,
milder solarizing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Transform

STRONGEST = 30
"""The magnitude at which every operation does its utmost."""


def _affine(image: Image, *matrix: float) -> Image:
    return image.transform(image.size, Transform.AFFINE, matrix)


def _solarize_add(image: Image, value: float) -> Image:
    brighter = [min(pixel + int(value), 255) for pixel in range(256)]
    return ImageOps.solarize(image.point(brighter * len(image.getbands())), 128)


# What each does, and its value at magnitude 0 and at the strongest. There is no flip: questions
# mention left and right.
_OPERATIONS: dict[str, tuple[Callable[[Image, float], Image], float, float]] = {
    "auto_contrast": (lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, 1),
    "rotate": (lambda image, value: image.rotate(value), 0, 30),
    "posterize": (lambda image, value: ImageOps.posterize(image, max(int(value), 1)), 0, 4),
    "solarize": (lambda image, value: ImageOps.solarize(image, ceil(value)), 0, 256),
    "solarize_add": (_solarize_add, 0, 110),
    "color": (lambda image, value: ImageEnhance.Color(image).enhance(value), 0.1, 1.9),
    "contrast": (lambda image, value: ImageEnhance.Contrast(image).enhance(value), 0.1, 1.9),
    "brightness": (lambda image, value: ImageEnhance.Brightness(image).enhance(value), 0.1, 1.9),
    "sharpness": (lambda image, value: ImageEnhance.Sharpness(image).enhance(value), 0.1, 1.9),
    "shear_x": (lambda image, value: _affine(image, 1, value, 0, 0, 1, 0), 0, 0.3),
    "shear_y": (lambda image, value: _affine(image, 1, 0, 0, value, 1, 0), 0, 0.3),
    "translate_x": (lambda image, value: _affine(image, 1, 0, value, 0, 1, 0), 0, 100),
    "translate_y": (lambda image, value: _affine(image, 1, 0, 0, 0, 1, value), 0, 100),
}
OPERATIONS = tuple(_OPERATIONS)
"""Names of the operations that are drawn from."""
_EITHER_WAY = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@dataclass(frozen=True)
class RandAugment:
    """Change an RGB image by a few random operations, before it is resized; for training only.

    Args:
        ops: number of operations, drawn with replacement.
        magnitude: strength, from 0 to 30; color, contrast, brightness and sharpness are scaled by
            0.1 up to 1.9. Translations are in pixels of the original image: too far for small ones.

    Raises:
        ValueError: for settings out of range.

    >>> from PIL import Image
    >>> RandAugment(ops=2, magnitude=9)(Image.new("RGB", (32, 24))).size
    (32, 24)
    """

    ops: int = 2
    magnitude: float = 9

    def __post_init__(self) -> None:
        if self.ops < 0 or not 0 <= self.magnitude <= STRONGEST:
            raise ValueError(
                f"ops={self.ops}, magnitude={self.magnitude}: give some operations and a strength "
                f"up to {STRONGEST}."
            )

    def __call__(self, image: Image, generator: torch.Generator | None = None) -> Image:
        """The changed image, of the same size; uses torch's global generator unless one is
        given."""
        chosen = torch.randint(len(OPERATIONS), (self.ops,), generator=generator).tolist()
        other_way = (torch.rand(self.ops, generator=generator) > 0.5).tolist()
        for operation_index, turned in zip(chosen, other_way, strict=True):
            name = OPERATIONS[operation_index]
            image = operate(
                image,
                name,
                -self.value(name) if turned and name in _EITHER_WAY else self.value(name),
            )
        return image

    def value(self, name: str) -> float:
        """What the operation takes at this magnitude: degrees, bits, pixels, a share or a
        factor."""
        _, low, high = _OPERATIONS[name]
        return self.magnitude / STRONGEST * (high - low) + low


def operate(image: Image, name: str, value: float) -> Image:
    """Apply one of `OPERATIONS` with a value."""
    return _OPERATIONS[name][0](image, value)
