"""A token map: where every token of an image and a text went, as data, JSON and HTML."""

from __future__ import annotations

import base64
import colorsys
import functools
import html
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

VERSION = 1
"""Version of the JSON form of a `TokenMap`."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LayerMap:
    """The tokens that remain after one reduction, in terms of the original tokens.

    Args:
        layer: index of the layer, -1 before the first.
        kept: patches that stand alone, by raster index.
        merged: groups of patches that became one token.
        dropped: patches that were pruned.
        text: groups of text tokens, most of them of one.
        text_dropped: text tokens that were pruned.
    """

    layer: int
    kept: tuple[int, ...]
    merged: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    text: tuple[tuple[int, ...], ...]
    text_dropped: tuple[int, ...] = ()

    @property
    def image_tokens(self) -> int:
        """Image tokens that remain, [CLS] not counted."""
        return len(self.kept) + len(self.merged)


@dataclass(frozen=True)
class TokenMap:
    """All reductions of one forward on one image and text.

    Args:
        rows: of patches in the image.
        columns: of patches in the image.
        words: the text tokens; in a prompt one stands for all placeholders of an image.
        layers: one map per reducing layer.
        decoder: whether this is a decoder's prompt, of which tokens leave after a layer.
        raster: whether patches are those of one grid; where an image is cut into crops, patch
            indices are the order in the prompt, and rows and columns mean nothing.
    """

    rows: int
    columns: int
    words: tuple[str, ...]
    layers: tuple[LayerMap, ...]
    decoder: bool = False
    raster: bool = True

    def to_json(self) -> str:
        """The map as JSON. Patch n is in row n // columns, column n % columns."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    def to_html(self, image: Image.Image | None = None, title: str = "") -> str:
        """The map as an HTML figure that needs no other file.

        Hovering over a token highlights it; in a `page`, also where it came from and went.

        Args:
            image: as the model received it; plain grey if not given.
            title: above the figure.
        """
        full = LayerMap(
            -1,
            tuple(range(self.rows * self.columns)),
            (),
            (),
            tuple((index,) for index in range(len(self.words))),
        )
        background = _background(self, image)
        panels = [_panel(self, full, self.captions(None), background.define)]
        for layer in self.layers:
            panels.append(_panel(self, layer, self.captions(layer), background.reuse))
        caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
        return (
            f'<figure class="token-map">{caption}{_LEGEND}'
            f'<p class="trace" aria-live="polite"></p>'
            f'<div class="panels">{"".join(panels)}</div></figure>'
        )

    def captions(self, layer: LayerMap | None) -> tuple[str, str]:
        """Two lines under a panel: when, and how many tokens remain; None for the input."""
        patches = self.rows * self.columns
        if self.layers:  # where an image is cut into crops, its last row may be filled up
            first = self.layers[0]
            patches = len(first.kept) + sum(map(len, first.merged)) + len(first.dropped)
        words = len(self.words)
        if layer is None:
            return "input", f"{patches} image tokens, {words} words"
        within = "" if self.decoder else "attention of "
        when = "before layer 0" if layer.layer < 0 else f"after {within}layer {layer.layer}"
        share = layer.image_tokens / max(patches, 1)
        return when, (
            f"{layer.image_tokens} of {patches} image tokens ({share:.0%}), "
            f"{len(layer.text)} of {words} words"
        )

    def _repr_html_(self) -> str:
        """The figure in a notebook, on plain grey: a map does not hold the image, `to_html` takes
        it."""
        return f"<style>{asset('map.css')}</style>{self.to_html()}"


def asset(name: str) -> str:
    """The text of a style sheet or script that lies beside this file."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()


def group_colour(index: int) -> Colour:
    """Colours that stay distinct for any number of groups: hues a golden ratio apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 if index % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def outline(
    group: Sequence[int], columns: int, inset: float
) -> Iterator[tuple[float, float, float, float]]:
    """Line segments (x0, y0, x1, y1) around a group of patches, in patches.

    Sides between two patches of the group are left out.

    Args:
        group: raster indices of patches.
        columns: of the raster.
        inset: distance of the lines from the patches' edges, so that those of neighbouring groups
            do not cover each other.
    """
    members = {divmod(patch, columns) for patch in group}
    for row, column in sorted(members):
        # A side goes to the edge of the patch where the group continues, and stops short elsewhere.
        x0 = column + inset * ((row, column - 1) not in members)
        x1 = column + 1 - inset * ((row, column + 1) not in members)
        y0 = row + inset * ((row - 1, column) not in members)
        y1 = row + 1 - inset * ((row + 1, column) not in members)
        if (row - 1, column) not in members:
            yield x0, y0, x1, y0
        if (row + 1, column) not in members:
            yield x0, y1, x1, y1
        if (row, column - 1) not in members:
            yield x0, y0, x0, y1
        if (row, column + 1) not in members:
            yield x1, y0, x1, y1


_LEGEND = (
    '<p class="legend"><span><i class="kept"></i>kept</span>'
    '<span><i class="merged"></i>merged: one outline, one token</span>'
    '<span><i class="dropped"></i>dropped</span></p>'
)


@dataclass(frozen=True)
class _Background:
    """SVG of the image: once in full, then by reference."""

    define: str
    reuse: str


def _background(shown: TokenMap, image: Image.Image | None) -> _Background:
    size = f'width="{shown.columns}" height="{shown.rows}"'
    if image is None or not shown.raster:  # crops: where a patch lies in the image is unknown
        plain = f'<rect class="blank" {size}/>'
        return _Background(plain, plain)
    data = _png(image)
    name = f"image-{zlib.crc32(data):08x}"
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return _Background(
        f'<image id="{name}" {size} preserveAspectRatio="none" href="{uri}"/>',
        f'<use href="#{name}"/>',
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _panel(shown: TokenMap, layer: LayerMap, captions: Sequence[str], background: str) -> str:
    """One panel: the image with a shape for every token, captions, and the words."""
    when, counts = map(html.escape, captions)
    short = when.removeprefix("after ").removeprefix("attention of ")
    shape = functools.partial(_token, columns=shown.columns)
    tokens = [
        *(shape((patch,), "dropped", "dropped") for patch in layer.dropped),
        *(shape((patch,), "kept", "kept") for patch in layer.kept),
        *(
            shape(group, "merged", f"{len(group)} patches merged", group_colour(index))
            for index, group in enumerate(layer.merged)
        ),
    ]
    words, num_merged = [], 0
    for group in layer.text:
        label = html.escape(" + ".join(shown.words[index] for index in group))
        style = ""
        if len(group) > 1:
            style = f' style="--group:{_hex(group_colour(num_merged))}"'
            num_merged += 1
        members = " ".join(map(str, group))
        words.append(f'<span class="word" data-words="{members}"{style}>{label}</span>')
    return (
        f'<div class="panel" data-when="{short}">'
        f'<svg viewBox="0 0 {shown.columns} {shown.rows}" role="img" '
        f'aria-label="{when}: {counts}">{background}{"".join(tokens)}</svg>'
        f'<p class="caption"><b>{when}</b><br>{counts}</p><p class="words">{"".join(words)}</p>'
        "</div>"
    )


def _token(
    group: Sequence[int], status: str, tooltip: str, colour: Colour | None = None, *, columns: int
) -> str:
    """An SVG group: the area of a token's patches, and the line around it."""
    squares = "".join(f"M{p % columns} {p // columns}h1v1h-1z" for p in group)
    inset = 0.06 if status == "merged" else 0.0
    lines = "".join(
        f"M{x0:g} {y0:g}L{x1:g} {y1:g}" for x0, y0, x1, y1 in outline(group, columns, inset)
    )
    style = f' style="--group:{_hex(colour)}"' if colour else ""
    return (
        f'<g class="token {status}" data-patches="{" ".join(map(str, group))}"{style}>'
        f'<title>{tooltip}</title><path class="area" d="{squares}"/>'
        f'<path class="edge" d="{lines}"/></g>'
    )


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
