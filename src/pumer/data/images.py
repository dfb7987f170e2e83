"""From an image file to the tensors that a model reads."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.Image import Resampling
from torch import Tensor

ImageSource = bytes | str | Path | Image.Image
ImageTransform = Callable[[Image.Image], Tensor]

HALF = (0.5, 0.5, 0.5)
_LOADING = threading.Lock()


class BrokenImageError(ValueError):
    """An image that is missing, truncated or no image at all; the message names it."""


def open_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Decode an image to RGB: an encoded image's bytes, a path, or a PIL image.

    The first frame of an animation; transparency is dropped and EXIF rotation ignored, as ViLT, METER and
    PuMer do. `name` stands for the image in the error where the source is no path.
    Raises BrokenImageError.
    """
    if isinstance(source, str | Path):
        name = str(source)
    try:
        with _no_half_images():
            image = source if isinstance(source, Image.Image) else Image.open(_stream(source))
            image.load()
            return _to_rgb(image)
    # Pillow's readers meet damaged files with anything from OSError to SyntaxError and struct.error.
    except Exception as error:
        reason = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImageError(f"{name} cannot be read as an image: {reason}; replace or remove it.") from error


def _stream(source: bytes | str | Path) -> io.BytesIO:
    # Read whole, so that no file stays open behind the image.
    return io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())


@contextmanager
def _no_half_images() -> Iterator[None]:
    """Pillow fills in what a truncated file lacks where this global is set, and other libraries set it."""
    with _LOADING:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255, turning nearly all white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # directly, Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True)
class Square:
    """Stretch to `size` x `size` pixels whatever the aspect ratio: PuMer's transform.

    PuMer's ViLT models take the defaults; its METER models take `Resampling.BICUBIC` and CLIP's mean and std.
    An RGB image gives float32 [3, size, size]: values scaled to 0..1, minus `mean`, divided by `std`.
    Raises ValueError for a size below 1.
    """

    size: int
    resample: Resampling = Resampling.BILINEAR
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; give the side in pixels, for example 384.")

    def __call__(self, image: Image.Image) -> Tensor:
        return _to_tensor(image.resize((self.size, self.size), self.resample), self.mean, self.std)


@dataclass(frozen=True)
class KeepAspect:
    """Resize keeping the aspect ratio, both sides floored to whole patches: ViLT's transform (ICML 2021).

    The shorter side becomes `shorter`, unless the longer one would then pass `longer` (default
    int(1333 / 800 * shorter), which is 639 for 384). `multiple` is the patch size; no side gets below one
    patch. An RGB image gives float32 [3, H, W]: values scaled to 0..1, minus `mean`, divided by `std`.
    Raises ValueError for a `shorter` below one patch or a `longer` below `shorter`.
    """

    shorter: int
    longer: int | None = None
    multiple: int = 32
    resample: Resampling = Resampling.BICUBIC
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= self.shorter:
            raise ValueError(
                f"shorter={self.shorter}, multiple={self.multiple}: the shorter side needs a patch at least."
            )
        if self.limit < self.shorter:
            raise ValueError(f"longer={self.longer} is below shorter={self.shorter}; leave it out for ViLT's limit.")

    @property
    def limit(self) -> int:
        """What the longer side may reach, in pixels."""
        return int(1333 / 800 * self.shorter) if self.longer is None else self.longer

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image of `height` x `width` is resized to."""
        scale = self.shorter / min(height, width)
        # The shorter side is set, not multiplied: a product just below it would lose a whole patch.
        new = [self.shorter, scale * width] if height < width else [scale * height, self.shorter]
        if max(new) > self.limit:
            shrink = self.limit / max(new)
            new = [shrink * side for side in new]
        rounded = (max(int(side + 0.5) // self.multiple, 1) * self.multiple for side in new)
        return next(rounded), next(rounded)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size(image.height, image.width)
        return _to_tensor(image.resize((width, height), self.resample), self.mean, self.std)


def _to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # np.array copies: PIL's is read-only
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images [3, H, W] of any sizes, padded with zeros at the right and the bottom.

    Returns `pixel_values` [B, 3, Hmax, Wmax] and `pixel_mask` int64 [B, Hmax, Wmax], 1 where the image is.
    """
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    pixel_values = images[0].new_zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for values, mask, image in zip(pixel_values, pixel_mask, images, strict=True):
        values[:, : image.shape[1], : image.shape[2]] = image
        mask[: image.shape[1], : image.shape[2]] = 1
    return pixel_values, pixel_mask
