"""The web page that `pumer demo` writes: results, token maps, and what they show."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from pumer.viz import page

_LEAD = """
<p>A vision-language model cuts an image into patches and runs every layer over all of them.
PuMer <b>prunes</b> image tokens that do not matter for the question and <b>merges</b> similar
tokens, layer by layer, so that later layers have less to compute.</p>
"""
_VARIANTS = """
<p class="soft"><b>base</b> is the unreduced model. <b>PuMer</b> was fine-tuned with its reducer,
<b>PuMer, untrained</b> was not. <b>ToMe</b>, <b>random</b> and <b>uniform</b> act on the base model
and end with as many image tokens as PuMer. <b>no vision</b> sees no image at all: what the
questions alone give away. ex/s: examples per second. MB: activation memory at its peak.</p>
"""
_MAPS = """
<p>In every panel a patch is kept, merged into the outlined token, or dropped. Follow one of them
through the layers: point at it, or tap it.</p>
"""
_OWN = """
<pre>import pumer

pumer.apply(model, "vilt-vqav2")  # a ViLT, METER or LLaVA of transformers
model(**inputs)                   # the same call, fewer tokens
pumer.remove(model)               # the original model again</pre>
<p class="soft">The same maps of your own image:
<code>pumer viz --image FILE --question TEXT --out map.png</code></p>
"""


@dataclass(frozen=True)
class Cells:
    """A table as text: a title, the names of its columns, and its rows.

    Args:
        title: above the table.
        columns: names; that of the first column may be empty.
        rows: as many cells each as there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_html(self, lead: str = "") -> str:
        """A table that folds into cards on a phone; the row named `lead` stands out."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = []
        for row in self.rows:
            cells = "".join(
                f'<td data-name="{html.escape(name)}">{html.escape(cell)}</td>'
                for name, cell in zip(self.columns, row, strict=True)
            )
            stands_out = ' class="lead"' if row[0] == lead else ""
            body.append(f"<tr{stands_out}>{cells}</tr>")
        return (
            f"<h2>{html.escape(self.title)}</h2>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )


def demo_page(
    tiles: Sequence[tuple[str, str]], scores: Cells, timings: Cells | None, maps: Sequence[str]
) -> str:
    """The page of a demo.

    Args:
        tiles: the main results, each a value and what it is.
        scores: the shipped models' results.
        timings: of the full-size model, if it was timed.
        maps: HTML of token maps.
    """
    boxes = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b>{html.escape(label)}</div>'
        for value, label in tiles
    )
    parts = [_LEAD, f'<div class="tiles">{boxes}</div>', scores.to_html("PuMer"), _VARIANTS]
    if timings is not None:
        parts.append(timings.to_html("PuMer (vilt-vqav2)"))
    parts += ["<h2>Which tokens were kept, merged and dropped</h2>", _MAPS, *maps]
    parts += ["<h2>Reduce your own model</h2>", _OWN]
    return page("Token reduction with PuMer", "".join(parts))
