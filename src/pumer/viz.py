"""Where each token went: kept, merged or dropped, layer by layer, as data and as a picture."""

from __future__ import annotations

import base64
import colorsys
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pumer._files import replacing
from pumer.adapters import ReductionStep
from pumer.adapters.decoder.prompt import PromptStep
from pumer.api import trace

VERSION = 1
"""Version of the JSON form of a `TokenMap`."""
_WIDTH = 264  # of a panel's picture, in pixels
_GAP = 16
_INK, _PAPER, _GREY = (28, 32, 38), (255, 255, 255), (200, 204, 210)


@dataclass(frozen=True)
class LayerMap:
    """What is left after one reduction, in terms of the original tokens.

    Args:
        layer: number of the layer, -1 before the first.
        kept: patches that stand alone, by raster number.
        merged: groups of patches that became one token.
        dropped: patches that are gone.
        text: groups of text tokens, most of them of one.
        text_dropped: text tokens that are gone.
    """

    layer: int
    kept: tuple[int, ...]
    merged: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    text: tuple[tuple[int, ...], ...]
    text_dropped: tuple[int, ...] = ()

    @property
    def image_tokens(self) -> int:
        """Image tokens left, [CLS] not counted."""
        return len(self.kept) + len(self.merged)


@dataclass(frozen=True)
class TokenMap:
    """All reductions of one forward on one picture and text.

    Args:
        rows: of patches in the image.
        columns: of patches in the image.
        words: the text tokens; in a prompt one stands for all placeholders of an image.
        layers: one map per reducing layer.
        decoder: whether this is a decoder's prompt, of which tokens leave after a layer.
        raster: whether patches are those of one grid; where an image is cut into crops, patch
            numbers are the order in the prompt, and rows and columns mean nothing.
    """

    rows: int
    columns: int
    words: tuple[str, ...]
    layers: tuple[LayerMap, ...]
    decoder: bool = False
    raster: bool = True

    def to_json(self) -> str:
        """The map as JSON. Patches are numbered along rows: number n is in row n // columns, column
        n % columns."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> TokenMap:
        """Read what `to_json` wrote; raises ValueError for another version."""
        data = json.loads(text)
        if data.pop("version", None) != VERSION:
            raise ValueError(
                f"this token map is not of version {VERSION}, the one that this pumer reads: draw "
                "it anew"
            )
        layers = tuple(
            LayerMap(
                layer["layer"],
                tuple(layer["kept"]),
                tuple(map(tuple, layer["merged"])),
                tuple(layer["dropped"]),
                tuple(map(tuple, layer["text"])),
                tuple(layer["text_dropped"]),
            )
            for layer in data["layers"]
        )
        more = {name: data[name] for name in ("decoder", "raster") if name in data}
        return TokenMap(data["rows"], data["columns"], tuple(data["words"]), layers, **more)

    def _repr_html_(self) -> str:
        """Its panels in a notebook, on plain grey: a map does not hold the image, `draw` takes
        it."""
        return _embedded(
            draw(self, Image.new("RGB", (self.columns, self.rows), _GREY)), "token map"
        )


def token_map(model: nn.Module, inputs: Mapping[str, Tensor], words: Sequence[str]) -> TokenMap:
    """Run a reduced model on one picture and text, and say where every token went.

    Args:
        model: with a reduction in force.
        inputs: of a batch of one, without padding.
        words: the text's tokens, as many as `input_ids` has.

    Raises:
        ValueError: for a larger batch, for several images, and for a model that nothing reduces or
            that has reduced nothing.
    """
    maps = token_maps(model, inputs, words)
    if len(maps) > 1:
        raise ValueError(
            f"{len(maps)} images went through the model: token_maps gives a map of each"
        )
    return maps[0]


@torch.inference_mode()
def token_maps(
    model: nn.Module, inputs: Mapping[str, Tensor], words: Sequence[str]
) -> tuple[TokenMap, ...]:
    """A `token_map` of every image of a prompt; arguments and errors are the same."""
    if len(inputs["input_ids"]) != 1:
        raise ValueError("a token map is of one image and one text: pass a batch of one")
    if len(words) != inputs["input_ids"].shape[1]:
        raise ValueError(
            f"there are {len(words)} words for {inputs['input_ids'].shape[1]} tokens: give one "
            "for each"
        )
    with trace(model) as steps:
        model(**inputs)
    if steps and steps[0].prompt is not None:
        return _prompt_maps(steps, words)
    if not steps or steps[0].patch_BN is None or steps[0].grid is None:
        raise ValueError(
            "nothing was reduced, so there is nothing to show: apply a reducer that reduces"
        )
    if len({step.layer for step in steps}) < len(steps):
        raise ValueError("two images went through the model: a token map is of one")
    return (_encoder_map(steps, words),)


def _encoder_map(steps: Sequence[ReductionStep], words: Sequence[str]) -> TokenMap:
    text, patches = steps[0].text, steps[0].patch_BN[0].tolist()
    assert steps[0].grid is not None
    rows, columns = steps[0].grid
    layers, plan = [], None
    for step in steps:
        plan = step.plan if plan is None else plan.then(step.plan)
        layers.append(_layer_map(step.layer, plan.slot_BN[0].tolist(), patches, text))
    return TokenMap(rows, columns, tuple(words), tuple(layers))


def _prompt_maps(steps: Sequence[ReductionStep], words: Sequence[str]) -> tuple[TokenMap, ...]:
    """A map of every image in a decoder's prompt; all have the same words."""
    first: PromptStep = steps[0].prompt
    assert first.image_BS is not None
    patches = [position for position, is_patch in enumerate(first.image_BS[0].tolist()) if is_patch]
    placeholders = {words[position] for position in patches}
    # Placeholders side by side, rows' ends among them, are one chip.
    chips: list[list[int]] = []
    for word_index, word in enumerate(words):
        if word in placeholders and chips and words[chips[-1][0]] in placeholders:
            chips[-1].append(word_index)
        else:
            chips.append([word_index])
    labels = tuple(words[chip[0]] + (f" x {len(chip)}" if len(chip) > 1 else "") for chip in chips)
    maps, start = [], 0
    for _, count, grid in first.images:
        image_patches = patches[start : start + count]
        start += count
        columns = grid[1] if grid else math.ceil(math.sqrt(count))
        layers = tuple(
            _prompt_layer(step, image_patches, chips, words, placeholders) for step in steps
        )
        rows = grid[0] if grid else math.ceil(count / columns)
        maps.append(TokenMap(rows, columns, labels, layers, decoder=True, raster=grid is not None))
    return tuple(maps)


def _prompt_layer(
    step: ReductionStep,
    patches: Sequence[int],
    chips: Sequence[Sequence[int]],
    words: Sequence[str],
    placeholders: set[str],
) -> LayerMap:
    """What one reduction left of an image, whose patches stand at these places, and of the
    words."""
    slots = step.prompt.slot_BS[0].tolist()
    image = _groups({patch: slots[position] for patch, position in enumerate(patches)})
    # A placeholder's chip stays: the panel above says what is left of it.
    text = {
        chip_index: slots[chip[0]] if words[chip[0]] not in placeholders else ("image", chip_index)
        for chip_index, chip in enumerate(chips)
    }
    groups = _groups(text)
    return LayerMap(
        step.layer,
        tuple(group[0] for group in image if len(group) == 1),
        tuple(group for group in image if len(group) > 1),
        tuple(patch for patch, position in enumerate(patches) if slots[position] < 0),
        tuple(groups),
        tuple(chip_index for chip_index, slot in text.items() if slot == -1),
    )


def _groups(slots: Mapping[int, Any]) -> list[tuple[int, ...]]:
    """Tokens that share a slot, in the order of their first; those that are gone are left out."""
    groups: dict[Any, list[int]] = {}
    for token, slot in slots.items():
        if slot != -1:
            groups.setdefault(slot, []).append(token)
    return sorted(tuple(group) for group in groups.values())


def _layer_map(layer: int, slots: list[int], patches: list[int], text: int) -> LayerMap:
    members: dict[int, list[int]] = {}
    words: dict[int, list[int]] = {}
    dropped, text_dropped = [], []
    for source, (slot, patch) in enumerate(zip(slots, patches, strict=True)):
        if source < text:
            words.setdefault(slot, []).append(source) if slot >= 0 else text_dropped.append(source)
        elif patch >= 0:
            members.setdefault(slot, []).append(patch) if slot >= 0 else dropped.append(patch)
    groups = sorted(tuple(sorted(group)) for group in members.values())
    return LayerMap(
        layer,
        tuple(group[0] for group in groups if len(group) == 1),
        tuple(group for group in groups if len(group) > 1),
        tuple(sorted(dropped)),
        tuple(sorted(tuple(group) for group in words.values())),
        tuple(text_dropped),
    )


def draw(shown: TokenMap, picture: Image.Image, title: str = "") -> Image.Image:
    """Draw a token map: the picture as the model got it, then one panel per reduction.

    Kept patches are clear, merged ones are tinted (same colour, same group), dropped ones are dark.
    Below each panel stand the text tokens, merged ones joined and tinted.
    """
    cell = max(_WIDTH // shown.columns, 6)
    size = (cell * shown.columns, cell * shown.rows)
    base = picture.convert("RGB").resize(
        size, Image.Resampling.NEAREST if picture.width < size[0] else None
    )
    if not shown.raster:  # it is not known where in the image a patch lies
        base = Image.new("RGB", size, _GREY)
    panels = [_panel(base, "as it goes in", [(i,) for i in range(len(shown.words))], shown.words)]
    for layer in shown.layers:
        within = "" if shown.decoder else "attention of "
        name = "before layer 0" if layer.layer < 0 else f"after {within}layer {layer.layer}"
        caption = f"{name}: {layer.image_tokens} image, {len(layer.text)} text tokens"
        panels.append(
            _panel(_paint(base, layer, shown.columns, cell), caption, layer.text, shown.words)
        )
    height = max(panel.height for panel in panels)
    top = 34 if title else _GAP
    sheet = Image.new(
        "RGB", (sum(p.width + _GAP for p in panels) + _GAP, top + height + _GAP), _PAPER
    )
    if title:
        ImageDraw.Draw(sheet).text((_GAP, 9), title, _INK, _font(15))
    x = _GAP
    for panel in panels:
        sheet.paste(panel, (x, top))
        x += panel.width + _GAP
    return sheet


def gallery(items: Sequence[tuple[Image.Image, str]], path: str | Path, heading: str) -> None:
    """Write drawings with their captions as one page that needs no other file."""
    figures = []
    for image, caption in items:
        # The caption stands in the picture already; this is for those who cannot see it.
        figures.append(f"<figure>{_embedded(image, caption)}</figure>")
    style = (
        "body{font:16px sans-serif;margin:2em;color:#1c2026}img{max-width:100%}figure{margin:0 0 "
        "2em}"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(heading)}</title>"
        f"<style>{style}</style><h1>{html.escape(heading)}</h1>"
        "<p>Clear: kept. Tinted: merged, one colour for each group. Dark: dropped.</p>"
        + "".join(figures)
        + "</html>\n"
    )
    with replacing(path) as file:
        file.write(page)


def _embedded(image: Image.Image, description: str) -> str:
    """An image as an element of a page that needs no other file."""
    data = base64.b64encode(png(image)).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_picture(pixel_values: Tensor, mean: float = 0.5, std: float = 0.5) -> Image.Image:
    """The picture behind normalised pixels [3,H,W]."""
    pixels = ((pixel_values * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _paint(base: Image.Image, layer: LayerMap, columns: int, cell: int) -> Image.Image:
    picture = base.copy()
    pen = ImageDraw.Draw(picture, "RGBA")

    def box(patch: int) -> tuple[int, int, int, int]:
        x, y = patch % columns * cell, patch // columns * cell
        return x, y, x + cell - 1, y + cell - 1

    for patch in layer.dropped:
        pen.rectangle(box(patch), (12, 14, 18, 215))
    for group_index, group in enumerate(layer.merged):
        for patch in group:
            pen.rectangle(box(patch), (*_colour(group_index), 120), (*_colour(group_index), 255))
    for patch in layer.kept:
        pen.rectangle(box(patch), None, (255, 255, 255, 150))
    return picture


def _panel(
    picture: Image.Image, caption: str, groups: Sequence[Sequence[int]], words: Sequence[str]
) -> Image.Image:
    font, small = _font(13), _font(12)
    width = max(picture.width, round(font.getlength(caption)) + 4)
    lines = _text_lines(groups, words, width, small)
    panel = Image.new("RGB", (width, picture.height + 26 + 24 * len(lines)), _PAPER)
    panel.paste(picture, (0, 0))
    pen = ImageDraw.Draw(panel)
    pen.text((0, picture.height + 5), caption, _INK, font)
    for row, line in enumerate(lines):
        x, y = 0, picture.height + 26 + 24 * row
        for label, colour, length in line:
            pen.rounded_rectangle((x, y, x + length - 4, y + 19), 4, colour)
            pen.text((x + 5, y + 3), label, _INK, small)
            x += length
    return panel


def _text_lines(
    groups: Any, words: Sequence[str], width: int, font: Any
) -> list[list[tuple[str, Any, int]]]:
    lines: list[list[tuple[str, Any, int]]] = [[]]
    used = merged = 0
    for group in groups:
        label = " + ".join(words[i] for i in group)
        colour: tuple[int, int, int] = (236, 238, 241)
        if len(group) > 1:
            colour = _light(_colour(merged))
            merged += 1
        length = round(font.getlength(label)) + 14
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0
        lines[-1].append((label, colour, length))
        used += length
    return lines


def _colour(index: int) -> tuple[int, int, int]:
    """Colours that stay apart however many there are: the hue goes on by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 if index % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _light(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (round(255 - (255 - part) * 0.45) for part in colour)
    return red, green, blue


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
