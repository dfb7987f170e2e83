"""Decoding, resizing and padding of images."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from pumer.lab.data.images import (
    BrokenImageError,
    KeepAspect,
    Square,
    Upright,
    open_image,
    pad_images,
)

SIDES = st.integers(1, 3000)


def picture(width=60, height=40, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_bytes_path_and_pil_give_the_same(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    for source in (
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        picture(),
        Image.open(io.BytesIO(data)),
    ):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(image, picture())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = open_image(encoded(picture(mode=mode), "TIFF"))
    assert (image.mode, image.size) == ("RGB", (60, 40))


def test_transparent_palette_does_not_warn(recwarn):
    assert open_image(encoded(picture(mode="P"), transparency=bytes(range(256)))).mode == "RGB"
    assert not recwarn.list


def test_16_bit_greys_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 0x0100, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert np.array(open_image(encoded(image)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_pgm_is_scaled_whatever_its_white():
    levels = np.array([0, 4, 512, 1023], dtype=">u2").tobytes()
    assert np.array(open_image(b"P5 4 1 1023\n" + levels))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_greys_are_refused(mode):
    image = Image.fromarray(np.array([[0, 256], [32768, 65535]], dtype=np.int32)).convert(mode)
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(
            BrokenImageError, match=f"its mode is {mode}, .*: save it with 8 or 16 bits; replace"
        ):
            open_image(source)


def test_orientation_is_ignored_unless_asked_for(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    data = encoded(picture(), exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(open_image(data), picture())
    for source in (data, tmp_path / "a.png"):
        assert np.array_equal(open_image(Upright(source)), picture().rotate(-90, expand=True))
    with pytest.raises(BrokenImageError, match=r"none\.png"):
        open_image(Upright(tmp_path / "none.png"))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA"])
def test_other_formats_are_not_decoded(kind):
    with pytest.raises(BrokenImageError, match="it is none of JPEG, PNG, WEBP"):
        open_image(encoded(picture(), kind))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(BrokenImageError, match="it is no regular file; replace"):
            open_image(path)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif")]
)
def test_truncated_file_is_named_whatever_the_global_says(
    tmp_path, monkeypatch, kind, suffix, lenient
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encoded(picture(), kind)
    path = tmp_path / f"cut.{suffix}"
    for length in (0, 10, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:length])
        with pytest.raises(BrokenImageError, match=f"cut.{suffix}"):
            open_image(path)
    assert lenient is ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_no_image_at_all(content):
    with pytest.raises(BrokenImageError, match="picture 7 cannot be read"):
        open_image(content, name="picture 7")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BrokenImageError, match=r"none\.png"):
        open_image(tmp_path / "none.png")


def test_damaged_png_chunk():
    data = bytearray(encoded(picture()))
    data[-30] ^= 0xFF  # inside the pixel data: its checksum no longer fits
    with pytest.raises(BrokenImageError):
        open_image(bytes(data))


def test_decompression_bomb_is_an_error_not_a_crash():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    data += struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(BrokenImageError, match="exceeds limit"):
        open_image(data)


def test_square_values():
    image = Image.new("RGB", (30, 10), (255, 0, 51))
    pixels = Square(8)(image)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    pixels = Square(8, mean=(0.0, 0.5, 0.2), std=(1.0, 0.25, 0.5))(image)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -2.0, 0.0]))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 480, (384, 512)),
        (640, 427, (384, 576)),
        (640, 360, (352, 608)),
        (480, 640, (512, 384)),
        (400, 100, (160, 608)),
        (2000, 10, (32, 608)),
        (384, 384, (384, 384)),
    ],
)
def test_keep_aspect_sizes(width, height, expected):
    assert KeepAspect(384).size(height, width) == expected
    assert KeepAspect(384)(Image.new("RGB", (width, height))).shape == (3, *expected)


@given(SIDES, SIDES, st.sampled_from([64, 224, 384]), st.sampled_from([16, 32]))
def test_keep_aspect_properties(height, width, shorter, multiple):
    transform = KeepAspect(shorter, multiple=multiple)
    new = transform.size(height, width)
    assert all(side % multiple == 0 and side >= multiple for side in new)
    assert min(new) <= shorter
    assert max(new) <= transform.limit
    assert transform.size(width, height) == new[::-1]


@pytest.mark.parametrize(("width", "height"), [(60, 40), (41, 77), (100, 25), (33, 33)])
def test_keep_aspect_is_vilts_processor(width, height):
    image = picture(width, height)
    theirs = ViltImageProcessorPil(size={"shortest_edge": 64}, size_divisor=16)(
        image, return_tensors="pt"
    )
    torch.testing.assert_close(
        KeepAspect(64, multiple=16)(image), theirs["pixel_values"][0], atol=1e-5, rtol=0
    )


def test_padding_is_vilts_processor():
    images = [picture(60, 40), picture(40, 60), picture(50, 50)]
    theirs = ViltImageProcessorPil(size={"shortest_edge": 64}, size_divisor=16)(
        images, return_tensors="pt"
    )
    pixel_values, pixel_mask = pad_images([KeepAspect(64, multiple=16)(image) for image in images])
    torch.testing.assert_close(pixel_values, theirs["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(pixel_mask, theirs["pixel_mask"])


def test_padding_of_equal_sizes_still_gives_a_mask():
    pixel_values, pixel_mask = pad_images([torch.ones(3, 4, 6)] * 2)
    assert pixel_values.shape == (2, 3, 4, 6)
    assert pixel_mask.dtype == torch.int64
    assert torch.equal(pixel_mask, torch.ones(2, 4, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Square(0),
        lambda: KeepAspect(16),
        lambda: KeepAspect(64, longer=32),
        lambda: KeepAspect(64, multiple=0),
    ],
)
def test_impossible_sizes(make):
    with pytest.raises(ValueError, match=r"size is 0|at least|below"):
        make()
