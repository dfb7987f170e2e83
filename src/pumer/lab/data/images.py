"""From an image file to the tensors that a model takes."""

from __future__ import annotations

import io
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded. Pillow knows many more, some of which start other programs."""
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_THIN = 16
"""From this aspect ratio on, an image is cut before it is enlarged."""
_LOADING = threading.Lock()
_DEEP = 1 << 16
"""How many levels of grey a 16-bit image has."""


@dataclass(frozen=True)
class Upright:
    """An image to rotate by the orientation in its EXIF data."""

    source: bytes | str | Path


ImageSource = bytes | str | Path | Image.Image | Upright
ImageTransform = Callable[[Image.Image], Tensor]


class BrokenImageError(ValueError):
    """An image that is missing, truncated or not an image; the message names it."""


def open_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Decode an image to RGB, from encoded bytes, a path, or a PIL image.

    Takes the first frame of an animation, drops transparency and rescales 16-bit grey. EXIF
    orientation is ignored, as by ViLT, METER and PuMer, unless the source is `Upright`. `name`
    names the image in errors if the source is not a path.

    Raises:
        BrokenImageError: for an image that cannot be decoded.
    """
    upright = isinstance(source, Upright)
    source = source.source if isinstance(source, Upright) else source
    if isinstance(source, str | Path):
        name = str(source)
    try:
        with _no_half_images():
            if isinstance(source, Image.Image):
                image = source
            else:
                image = Image.open(_stream(source), formats=FORMATS)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if upright else image)
    # Pillow's readers meet damaged files with anything from OSError to SyntaxError and
    # struct.error.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}" if unknown else str(error).rstrip(".")
        raise BrokenImageError(
            f"{name} cannot be read as an image: {reason}; replace or remove it."
        ) from error


def _stream(source: bytes | str | Path) -> io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may never end
        raise OSError("it is no regular file")
    return io.BytesIO(path.read_bytes())  # whole, so that no file stays open behind the image


@contextmanager
def _no_half_images() -> Iterator[None]:
    """Make Pillow reject truncated files, even where another library has told it to fill them
    in."""
    with _LOADING:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # a direct conversion warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A deep grey image rescaled to 0..255; Pillow would clip it to nearly all white."""
    # Pillow decodes 16 bits of PGM, and of PNG in older releases, into 32.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if not deep:
        raise OSError(
            f"its mode is {image.mode}, 32-bit greys, whose black and white nobody can know: save "
            "it with 8 or 16 bits"
        )
    return (np.asarray(image).astype(np.int64).clip(0, _DEEP - 1) >> 8).astype(np.uint8)


@dataclass(frozen=True)
class Square:
    """Stretch to `size` x `size` pixels, ignoring the aspect ratio: PuMer's transform.

    The defaults are those of PuMer's ViLT models; its METER models use `Resampling.BICUBIC` and
    CLIP's mean and std. An RGB image gives float32 [3, size, size]: values scaled to 0..1, minus
    `mean`, divided by `std`. Raises ValueError for a size below 1.

    >>> Square(size=32)(Image.new("RGB", (64, 48))).shape
    torch.Size([3, 32, 32])
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
class Crop:
    """Resize the shorter side to `size` and cut out the middle square: METER's own transform.

    It is CLIP's as torchvision has it; transformers' rounds down. An RGB image gives float32
    [3, size, size]: values scaled to 0..1, minus `mean`, divided by `std`.
    Raises ValueError for a size below 1.
    """

    size: int
    resample: Resampling = Resampling.BICUBIC
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        self._square()

    def __call__(self, image: Image.Image) -> Tensor:
        image = crop_ends(image)
        shorter = min(image.size)
        width, height = (self.size * side // shorter for side in image.size)
        left_edge, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = image.resize((width, height), self.resample)
        return self._square()(
            resized.crop((left_edge, top, left_edge + self.size, top + self.size))
        )

    def _square(self) -> Square:
        return Square(self.size, self.resample, self.mean, self.std)


def crop_ends(image: Image.Image, aspect: float = 1) -> Image.Image:
    """Crop the ends of a very thin image before its middle is cut out at a lower aspect ratio.

    Enlarging all of a 3 x 65000 image to cut out a square would take gigabytes. Other images are
    unchanged.
    """
    shorter, longer = sorted(image.size)
    length = shorter * max(_THIN, 2 * ceil(aspect))
    if longer <= length:
        return image
    start = (longer - length) // 2
    end = longer - start  # as much at either end, so that the middle stays where it is
    wide = image.width > image.height
    return image.crop((start, 0, end, shorter) if wide else (0, start, shorter, end))


@dataclass(frozen=True)
class KeepAspect:
    """Resize keeping the aspect ratio, both sides rounded down to whole patches: ViLT's transform
    (ICML 2021).

    The shorter side becomes `shorter`, unless the longer one would exceed `longer` (default
    int(1333 / 800 * shorter), 639 for 384). `multiple` is the patch size; no side gets below one
    patch. An RGB image gives float32 [3, H, W]: values scaled to 0..1, minus `mean`, divided by
    `std`. Raises ValueError for a `shorter` below one patch or a `longer` below `shorter`.

    >>> KeepAspect(shorter=64, multiple=32)(Image.new("RGB", (640, 480))).shape
    torch.Size([3, 64, 64])
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
                f"shorter={self.shorter}, multiple={self.multiple}: the shorter side needs a "
                "patch at least."
            )
        if self.limit < self.shorter:
            raise ValueError(
                f"longer={self.longer} is below shorter={self.shorter}; leave it out for ViLT's "
                "limit."
            )

    @property
    def limit(self) -> int:
        """Limit of the longer side, in pixels."""
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
    pixels = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    )  # np.array copies: PIL's is read-only
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images [3, H, W] of any sizes, padded with zeros on the right and at the bottom.

    Returns `pixel_values` [B, 3, Hmax, Wmax] and `pixel_mask` int64 [B, Hmax, Wmax], 1 on the
    image.
    """
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    pixel_values = images[0].new_zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for values, mask, image in zip(pixel_values, pixel_mask, images, strict=True):
        values[:, : image.shape[1], : image.shape[2]] = image
        mask[: image.shape[1], : image.shape[2]] = 1
    return pixel_values, pixel_mask
