"""`Report`: tokens and multiply-accumulates, layer by layer, as data and as a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pumer.costs.reducer import NO_COST, ReducerCost

Lengths = tuple[tuple[int, int], ...]
GIGA = 1e9
HEADS = ("expert", "head")
TOWERS = ("text encoder", "vision tower", "projection")
IMAGE_PARTS = ("embedding", "vision tower", "projection")
"""Parts that run once per image if a model with towers scores it with several texts."""


@dataclass(frozen=True)
class LayerCost:
    """One layer of a `Report`.

    Args:
        layer: its index.
        text: text tokens after it.
        image: image tokens after it.
        macs: multiply-accumulates per example, those of the reducer included.
        base_macs: those of the unreduced model.
    """

    layer: int
    text: int
    image: int
    macs: int
    base_macs: int


@dataclass(frozen=True)
class Report:
    """Tokens and multiply-accumulates of a model with and without its reducer, per example.

    Args:
        model: class of the model.
        reducer: the reducer's name and settings; None for an unreduced model.
        entry: (text, image) tokens at the model's entry, both with their [CLS].
        lengths: (text, image) tokens before the first layer and after every layer.
        tower: image tokens before the vision tower's first layer and after every layer; empty
            without a tower.
        layers: every layer's tokens and cost.
        parts: MACs by part: embedding, attention, mlp, head and reducer, and of any towers.
        base_parts: those of the unreduced model at the same entry.
        forwards_per_example: how often one example goes through the layers; costs are for all of
            these together.
        reducer_cost: the reducer's own cost for one example; `parts` has its MACs.
        ran: lengths of the last forward, None before any.
        planned: the planned lengths for its texts and images, None before any.

    Example:
        >>> report = pumer.report(pumer.apply(pumer.load("scenes-vilt"), "tome"))
        >>> sum(report.parts.values()) == report.macs
        True
    """

    model: str
    reducer: dict[str, Any] | None
    entry: tuple[int, int]
    lengths: Lengths
    tower: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    parts: dict[str, int]
    base_parts: dict[str, int]
    forwards_per_example: int = 1
    reducer_cost: ReducerCost = NO_COST
    ran: Lengths | None = None
    planned: Lengths | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates per example."""
        return sum(self.parts.values())

    @property
    def base_macs(self) -> int:
        """Multiply-accumulates per example of the unreduced model."""
        return sum(self.base_parts.values())

    @property
    def ratio(self) -> float:
        """How many times fewer FLOPs than unreduced."""
        return self.base_macs / self.macs

    @property
    def average_tokens(self) -> tuple[float, float]:
        """(text, image) tokens after a layer, averaged over all layers."""
        depth = len(self.layers)
        return sum(layer.text for layer in self.layers) / depth, sum(
            layer.image for layer in self.layers
        ) / depth

    @property
    def active(self) -> bool | None:
        """Whether the last forward had the planned lengths; None before any forward."""
        return None if self.ran is None else self.ran == self.planned

    @property
    def state(self) -> str:
        """`active` in words."""
        if self.reducer is None:
            return "nothing reduces this model; pumer.apply(model, ...) does"
        if self.ran is None or self.planned is None:
            return "not run yet: call the model once to see the lengths it really has"
        if self.active:
            (text, image), (last_text, last_image) = self.ran[0], self.ran[-1]
            return (
                f"active: the last forward had the planned lengths in every layer, from {text} + "
                f"{image} to {last_text} + {last_image} tokens (text + image)"
            )
        pairs = zip(self.ran, self.planned, strict=True)
        position, (real, planned) = next(
            (n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        position -= len(self.ran) - len(self.lengths)
        where = f"after layer {position - 1}" if position else "before the first layer"
        where = "in the vision tower" if position < 0 else where
        return (
            f"NOT AS PLANNED: {where} the last forward had {real} (text, image) tokens instead of "
            f"{planned}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "model": self.model,
            "reducer": self.reducer,
            "entry": list(self.entry),
            "passes": self.forwards_per_example,
            "tower": list(self.tower),
            "layers": [dict(vars(layer)) for layer in self.layers],
            "average_tokens": list(self.average_tokens),
            "macs": self.macs,
            "base_macs": self.base_macs,
            "flops": 2 * self.macs,
            "base_flops": 2 * self.base_macs,
            "ratio": self.ratio,
            "parts": dict(self.parts),
            "base_parts": dict(self.base_parts),
            "ran": None if self.ran is None else [list(pair) for pair in self.ran],
            "active": self.active,
            "state": self.state,
        }

    def __str__(self) -> str:
        entry_length = sum(self.entry)
        rows: list[tuple[str, ...]] = [("layer", "text", "image", "tokens", "GMACs", "unreduced")]
        rows.append(("entry", *map(str, self.entry), "100 %", *self._giga("embedding")))
        for part in TOWERS:
            if part in self.parts:
                # Its output length is in the next line.
                rows.append((part, "", "", "", *self._giga(part)))
        if self.lengths[0] != self.entry:
            text, image = self.lengths[0]
            rows.append(
                (
                    "before",
                    str(text),
                    str(image),
                    f"{(text + image) / entry_length * 100:.0f} %",
                    "",
                    "",
                )
            )
        for layer in self.layers:
            share = f"{(layer.text + layer.image) / entry_length * 100:.0f} %"
            costs = (f"{cost / GIGA:.3f}" for cost in (layer.macs, layer.base_macs))
            rows.append((str(layer.layer), str(layer.text), str(layer.image), share, *costs))
        for part in HEADS:
            if part in self.parts:
                rows.append((part, "", "", "", *self._giga(part)))
        rows.append(
            ("total", "", "", "", f"{self.macs / GIGA:.3f}", f"{self.base_macs / GIGA:.3f}")
        )
        average_text, average_image = self.average_tokens
        forwards_per_example = (
            f", {self.forwards_per_example} passes per example"
            if self.forwards_per_example > 1
            else ""
        )
        return "\n".join(
            [
                f"{self.model}, {self._reducer_name()}{forwards_per_example}",
                "",
                *align(rows),
                "",
                f"{2 * self.macs / GIGA:.2f} GFLOPs per example instead of "
                f"{2 * self.base_macs / GIGA:.2f}: {self.ratio:.2f} times fewer (FLOPs = 2 x MACs "
                "of matrix products and "
                "convolutions)",
                f"on average {average_text:.1f} text and {average_image:.1f} image tokens after a "
                f"layer, {(average_text + average_image) / entry_length * 100:.0f} % of those at "
                "the entry",
                f"the reducer's own part is {self.parts['reducer'] / self.macs * 100:.2f} % of "
                "the FLOPs",
                self.state,
            ]
        )

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def _giga(self, part: str) -> tuple[str, str]:
        return f"{self.parts[part] / GIGA:.3f}", f"{self.base_parts[part] / GIGA:.3f}"

    def _reducer_name(self) -> str:
        if self.reducer is None:
            return "no reducer"
        settings = ", ".join(
            f"{name}={value!r}" for name, value in self.reducer.items() if name != "reducer"
        )
        return f"{self.reducer['reducer']}({settings})"


def align(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of a table with its columns flush right, the first `left` ones flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
