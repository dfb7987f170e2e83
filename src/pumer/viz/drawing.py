"""A token map as an image file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pumer.viz.maps import Colour, LayerMap, TokenMap, group_colour, outline

_PANEL = 264  # width of a panel, in pixels
_COLUMNS = 4  # panels in a row of the drawing
_GAP = 16
_INK, _SOFT, _PAPER, _GREY = (28, 32, 38), (89, 98, 109), (255, 255, 255), (200, 204, 210)
_CHIP, _DARK = (236, 238, 241), (12, 14, 18)
_CHIP_HEIGHT, _CAPTION_HEIGHT, _LEGEND_HEIGHT = 24, 42, 30
_Chip = tuple[str, Colour | None, int]
"""A word or several merged ones, the colour of the group, and the width in pixels."""


def draw(shown: TokenMap, image: Image.Image, title: str = "") -> Image.Image:
    """Draw a token map: the image as the model received it, then one panel per reduction.

    Kept patches are clear, merged ones outlined (same colour, same token), dropped ones dark. Below
    each panel stand the text tokens, merged ones joined and outlined. Rows wrap after four panels,
    and all drawings have one width.

    >>> from pumer.viz import LayerMap, TokenMap
    >>> layer = LayerMap(1, kept=(0,), merged=((1, 3),), dropped=(2,), text=((0,), (1,)))
    >>> shown = TokenMap(rows=2, columns=2, words=("a", "cat"), layers=(layer,))
    >>> draw(shown, Image.new("RGB", (64, 64)), "a title").width
    1136
    """
    # Panels have one width, whatever the number of patches.
    size = (_PANEL, round(_PANEL * shown.rows / shown.columns))
    base = image.convert("RGB").resize(
        size, Image.Resampling.NEAREST if image.width < size[0] else None
    )
    if not shown.raster:  # it is not known where in the image a patch lies
        base = Image.new("RGB", size, _GREY)
    words = [(index,) for index in range(len(shown.words))]
    panels = [_panel(base, shown.captions(None), words, shown.words)]
    for layer in shown.layers:
        painted = _paint(base, layer, shown.columns)
        panels.append(_panel(painted, shown.captions(layer), layer.text, shown.words))

    rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
    heights = [max(panel.height for panel in row) for row in rows]
    width = _COLUMNS * (_PANEL + _GAP) + _GAP
    title_lines = _wrapped(title, width - 2 * _GAP, _font(15)) if title else []
    top = _GAP // 2 + 20 * len(title_lines) + _LEGEND_HEIGHT
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(title_lines):
        pen.text((_GAP, 9 + 20 * index), line, _INK, _font(15))
    _legend(pen, _GAP, top - _LEGEND_HEIGHT + 8)
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            sheet.paste(panel, (_GAP + column * (_PANEL + _GAP), top))
        top += height + _GAP
    return sheet


def to_image(pixel_values: Tensor, mean: float = 0.5, std: float = 0.5) -> Image.Image:
    """The image behind normalised pixels [3,H,W].

    >>> to_image(torch.zeros(3, 2, 4)).getpixel((0, 0))
    (128, 128, 128)
    """
    pixels = ((pixel_values * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _paint(base: Image.Image, layer: LayerMap, columns: int) -> Image.Image:
    """Darken what was dropped, outline what was merged, and box what was kept."""
    image = base.copy()
    pen = ImageDraw.Draw(image, "RGBA")
    cell = base.width / columns

    def box(patch: int) -> tuple[int, int, int, int]:
        row, column = divmod(patch, columns)
        x0, y0, x1, y1 = (
            round(side * cell) for side in (column, row, column + 1, row + 1)
        )  # neighbours share no pixel
        return x0, y0, x1 - 1, y1 - 1

    for patch in layer.dropped:
        pen.rectangle(box(patch), (*_DARK, 215))
    for patch in layer.kept:
        pen.rectangle(box(patch), None, (255, 255, 255, 90))
    # A dark line under each coloured one sets it off from whatever the image shows there.
    lines = [
        (tuple(cell * end for end in line), group_colour(index))
        for index, group in enumerate(layer.merged)
        for line in outline(group, columns, 2 / cell)
    ]
    for line, _ in lines:
        pen.line(line, (*_DARK, 150), 4)
    for line, colour in lines:
        pen.line(line, colour, 2)
    return image


def _panel(
    image: Image.Image,
    captions: tuple[str, str],
    groups: Sequence[Sequence[int]],
    words: Sequence[str],
) -> Image.Image:
    """An image, two lines of caption, and the words in lines of chips."""
    small = _font(12)
    lines = _chip_lines(groups, words, small)
    top = image.height + _CAPTION_HEIGHT
    panel = Image.new("RGB", (_PANEL, top + _CHIP_HEIGHT * len(lines)), _PAPER)
    panel.paste(image, (0, 0))
    pen = ImageDraw.Draw(panel)
    pen.text((0, image.height + 5), captions[0], _INK, _font(13))
    pen.text((0, image.height + 22), captions[1], _SOFT, small)
    for index, line in enumerate(lines):
        x, y = 0, top + _CHIP_HEIGHT * index
        for label, colour, length in line:
            box = (x, y, x + length - 4, y + _CHIP_HEIGHT - 5)
            pen.rounded_rectangle(box, 4, _CHIP, colour, 2 if colour else 0)
            pen.text((x + 5, y + 3), label, _INK, small)
            x += length
    return panel


def _chip_lines(
    groups: Sequence[Sequence[int]], words: Sequence[str], font: Any
) -> list[list[_Chip]]:
    """The words in lines no wider than a panel; what is longer than a line is cut off."""
    lines: list[list[_Chip]] = [[]]
    used = num_merged = 0
    for group in groups:
        label = " + ".join(words[index] for index in group)
        while font.getlength(label) > _PANEL - 14:
            label = label.removesuffix("…")[:-1] + "…"
        colour = None
        if len(group) > 1:
            colour = group_colour(num_merged)
            num_merged += 1
        length = round(font.getlength(label)) + 14
        if lines[-1] and used + length > _PANEL + 4:
            lines.append([])
            used = 0
        lines[-1].append((label, colour, length))
        used += length
    return lines


def _legend(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """Three swatches and what they mean."""
    font = _font(12)
    for label, fill, line, width in (
        ("kept", (125, 143, 120), (223, 229, 218), 1),
        ("merged: one outline, one token", (125, 143, 120), group_colour(1), 2),
        ("dropped", _DARK, None, 0),
    ):
        pen.rectangle((x, y, x + 13, y + 13), fill, line, width)
        pen.text((x + 20, y), label, _SOFT, font)
        x += 20 + round(font.getlength(label)) + 20


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """A text in lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split(" "):
        extended = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font.getlength(extended) > width:
            lines.append(word)
        else:
            lines[-1] = extended
    return lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
