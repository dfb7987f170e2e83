"""What a reducer does to a model, in tokens and FLOPs, and whether it really does it.

Costs are multiply-accumulates (MACs) of matrix products and convolutions per example; FLOPs are
twice that. Additions, norms, activations and softmax are left out, as in nearly every published
number. What the reducer itself computes is counted too and stands in a part of its own.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pumer.adapters import Adapter, Patch, find, supported
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.api import active
from pumer.costs.reducer import NOTHING, Own, own_costs
from pumer.reducers import EMBEDDINGS, Reducer, Unreduced, to_dict
from pumer.reducers.base import Grid, ModelShape

Lengths = tuple[tuple[int, int], ...]
GIGA = 1e9
TOWERS = ("text encoder", "vision tower", "projection")
PICTURES = ("embedding", "vision tower", "projection")
"""Parts that see a picture once, where a model with towers compares it with several texts."""


@dataclass(frozen=True)
class LayerCost:
    """One layer of a `Report`.

    Args:
        layer: its number.
        text: text tokens after it.
        image: image tokens after it.
        macs: multiply-accumulates per example, the reducer's own included.
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
        reducer: the reducer's name and settings, None where nothing reduces the model.
        entry: (text, image) tokens at the model's entry, both with their [CLS].
        lengths: (text, image) tokens before the first layer and after every one.
        tower: image tokens before the first layer of the vision tower and after every one; empty
            without a tower.
        layers: every layer's tokens and cost.
        parts: MACs by part: embedding, attention, mlp, head and reducer, and those of the towers
            where there are any.
        base_parts: those of the unreduced model at the same entry.
        passes: how often one example goes through the layers; costs are for all passes together.
        own: what choosing and reducing takes, of which `parts` has the MACs alone; for all passes,
            too.
        ran: lengths of the last forward, None if there was none.
        planned: what they had to be for its texts and images, None if there was none.
    """

    model: str
    reducer: dict[str, Any] | None
    entry: tuple[int, int]
    lengths: Lengths
    tower: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    parts: dict[str, int]
    base_parts: dict[str, int]
    passes: int = 1
    own: Own = NOTHING
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
        """Whether the last forward had the planned lengths; None if there was no forward, or
        nothing to plan."""
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
                f"{image} "
                f"to {last_text} + {last_image} tokens (text + image)"
            )
        pairs = zip(self.ran, self.planned, strict=True)
        number, (real, planned) = next(
            (n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        number -= len(self.ran) - len(self.lengths)
        where = f"after layer {number - 1}" if number else "before the first layer"
        where = "in the vision tower" if number < 0 else where
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
            "passes": self.passes,
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
        whole = sum(self.entry)
        rows: list[tuple[str, ...]] = [("layer", "text", "image", "tokens", "GMACs", "unreduced")]
        rows.append(("entry", *map(str, self.entry), "100 %", *self._giga("embedding")))
        for part in TOWERS:
            if part in self.parts:
                # What the tower hands on is seen in the next line.
                rows.append((part, "", "", "", *self._giga(part)))
        if self.lengths[0] != self.entry:
            text, image = self.lengths[0]
            rows.append(
                ("before", str(text), str(image), f"{(text + image) / whole * 100:.0f} %", "", "")
            )
        for layer in self.layers:
            share = f"{(layer.text + layer.image) / whole * 100:.0f} %"
            costs = (f"{cost / GIGA:.3f}" for cost in (layer.macs, layer.base_macs))
            rows.append((str(layer.layer), str(layer.text), str(layer.image), share, *costs))
        rows.append(("head", "", "", "", *self._giga("head")))
        rows.append(
            ("total", "", "", "", f"{self.macs / GIGA:.3f}", f"{self.base_macs / GIGA:.3f}")
        )
        average_text, average_image = self.average_tokens
        passes = f", {self.passes} passes per example" if self.passes > 1 else ""
        return "\n".join(
            [
                f"{self.model}, {self._reducer_name()}{passes}",
                "",
                *align(rows),
                "",
                f"{2 * self.macs / GIGA:.2f} GFLOPs per example instead of "
                f"{2 * self.base_macs / GIGA:.2f}: "
                f"{self.ratio:.2f} times fewer (FLOPs = 2 x MACs of matrix products and "
                "convolutions)",
                f"on average {average_text:.1f} text and {average_image:.1f} image tokens after a "
                "layer, "
                f"{(average_text + average_image) / whole * 100:.0f} % of those at the entry",
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


def report(model: nn.Module, text: int | None = None, image: int | None = None) -> Report:
    """Tokens and FLOPs per layer of a model with and without the reducer in force, and whether it
    is really active.

    Args:
        model: a supported model, reduced or not.
        text: text tokens at the entry, [CLS] included; those of a full-length text if not given.
        image: image tokens at the entry, [CLS] included; those of a picture of the configured size
            if not given.

    Raises:
        ValueError: for an unsupported model, or lengths below 1.
    """
    model = supported(model)
    adapter, patch = find(model), active(model)
    default_text, default_image = adapter.default_lengths(model)
    # A picture of another size has a grid nobody told us.
    grid = adapter.default_grid(model) if image in (None, default_image) else None
    entry = (default_text if text is None else text, default_image if image is None else image)
    if min(entry) < 1:
        raise ValueError(
            f"a text and an image have at least 1 token each, not {entry[0]} and {entry[1]}"
        )
    depth, passes = adapter.depth(model), adapter.passes(model)
    reducer = Unreduced() if patch is None else patch.reducer
    tower, lengths, own = _plan(reducer, adapter, model, *entry, grid)
    base = [entry] * (depth + 1)
    layers = zip(
        adapter.layer_macs(model, lengths, reducer.after_layer),
        adapter.layer_macs(model, base),
        strict=True,
    )
    ran, planned = _last_forward(patch, adapter, model)
    spent = passes * sum(own.values(), NOTHING)
    made = Report(
        model=type(model).__name__,
        reducer=None if patch is None else to_dict(reducer),
        entry=entry,
        lengths=lengths,
        tower=tower,
        layers=tuple(
            LayerCost(
                number,
                *lengths[number + 1],
                passes * (sum(macs) + own[number].macs),
                passes * sum(base_macs),
            )
            for number, (macs, base_macs) in enumerate(layers)
        ),
        parts=adapter.macs(model, lengths, entry, tower, reducer.after_layer)
        | {"reducer": spent.macs},
        base_parts=adapter.macs(model, base) | {"reducer": 0},
        passes=passes,
        own=spent,
        ran=ran,
        planned=planned,
    )
    if isinstance(adapter, DecoderAdapter):
        from pumer.costs.decoder import decoding  # which builds on what is here

        return decoding(model, adapter, made)
    return made


def last_forward_macs(model: nn.Module) -> int:
    """Multiply-accumulates per example of the last forward of a reduced model, padding included.

    Raises ValueError if there was none.
    """
    return sum(last_forward_parts(model).values())


def last_forward_parts(model: nn.Module) -> dict[str, int]:
    """The same by part, as in `Report.parts`; raises ValueError if there was no forward."""
    model = supported(model)
    adapter, patch = find(model), active(model)
    if patch is None or patch.entry is None:
        raise ValueError("apply a reducer (pumer.Unreduced() for none) and call the model first")
    text, image, grid = patch.entry
    ran = (
        (tuple(patch.tower), tuple(patch.lengths)) if patch.reducer.leaves_gaps else None
    )  # the data have decided
    tower, lengths, own = _plan(patch.reducer, adapter, model, text, image, grid, ran)
    macs = adapter.macs(model, lengths, (text, image), tower, patch.reducer.after_layer)
    return macs | {"reducer": adapter.passes(model) * sum(own.values(), NOTHING).macs}


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


def planned_lengths(
    reducer: Reducer, depth: int, text: int, image: int, grid: Grid | None = None, prefix: int = 1
) -> Lengths:
    """(text, image) tokens before the first layer and after every one, for a model with `depth`
    layers.

    Args:
        reducer: the method and its settings.
        depth: number of layers.
        text: text tokens at the entry, [CLS] included.
        image: image tokens at the entry, [CLS] included.
        grid: rows and columns of patches, for methods that go by place.
        prefix: structure tokens at the head of each modality.
    """
    reducer = reducer.resolve(ModelShape(depth, depth - 1, max(image - prefix, 0)))
    lengths = []
    entered = image
    for layer in range(EMBEDDINGS, depth):
        if reducer.reduces_at(layer):
            text, image = reducer.lengths_from(entered, text, image, layer, prefix, grid)
            grid = None  # what is left is no grid any more
        if layer == EMBEDDINGS:
            entered = image
        lengths.append((text, image))
    return tuple(lengths)


def _plan(
    reducer: Reducer,
    adapter: Adapter,
    model: nn.Module,
    text: int,
    image: int,
    grid: Grid | None,
    ran: tuple[tuple[int, ...], Lengths] | None = None,
) -> tuple[tuple[int, ...], Lengths, dict[int, Own]]:
    """Lengths in the vision tower and after it, and what reducers take: by layer, all of the tower
    at `EMBEDDINGS`.

    Args as for `planned_lengths`, in tensors without data where the model lies on a device; `ran`
    are the lengths of the tower and after it, where they are known.
    """
    place = "cpu" if next(model.parameters()).device.type == "cpu" else "meta"
    tower = ran[0] if ran else _planned_tower(reducer, adapter, model, image, grid)
    first, spent = (text, image), NOTHING
    if reducer.in_tower is not None:
        # Its tokens have no text before them.
        inside = [(0, length) for length in tower]
        shape = adapter.tower_attention_shape(model)
        pictures, _ = adapter.tower_entry(model, image)
        spent = pictures * sum(
            own_costs(reducer.in_tower, shape, inside[0], inside, grid, place).values(), NOTHING
        )
        first = text, adapter.tower_exit(model, image, tower[-1])
        grid = None if tower[-1] != tower[0] else grid
    lengths = (
        ran[1]
        if ran
        else planned_lengths(reducer, adapter.depth(model), *first, grid, adapter.prefix)
    )
    patch = active(model)
    own = own_costs(
        reducer,
        adapter.attention_shape(model),
        first,
        lengths,
        grid,
        place,
        adapter.crosses,
        None if patch is None else patch.parts,
        adapter.encoder_facts(model, reducer.needs, first[1], place),
        adapter.prefix,
    )
    own[EMBEDDINGS] += spent
    return tower, lengths, own


def _planned_tower(
    reducer: Reducer, adapter: Adapter, model: nn.Module, image: int, grid: Grid | None
) -> tuple[int, ...]:
    """Image tokens before the first layer of the vision tower and after every one."""
    depth = adapter.tower_depth(model)
    _, entered = adapter.tower_entry(model, image)
    if reducer.in_tower is None:
        return (entered,) * (depth + 1) if depth else ()
    return tuple(length for _, length in planned_lengths(reducer.in_tower, depth, 0, entered, grid))


def _last_forward(
    patch: Patch | None, adapter: Adapter, model: nn.Module
) -> tuple[Lengths | None, Lengths | None]:
    """Lengths that the last forward had, and those it had to have: in the vision tower first, if it
    is reduced."""
    if patch is None or patch.entry is None:
        return None, None
    if patch.planned is not None:
        return tuple(patch.lengths), tuple(patch.planned)
    text, image, grid = patch.entry
    tower = _planned_tower(patch.reducer, adapter, model, image, grid)
    left = grid if not tower or tower[-1] == image else None
    ran = tuple(patch.lengths)
    planned = planned_lengths(
        patch.reducer,
        adapter.depth(model),
        text,
        tower[-1] if tower else image,
        left,
        adapter.prefix,
    )
    if patch.reducer.in_tower is not None:
        ran = (*((text, length) for length in patch.tower), *ran)
        planned = (*((text, length) for length in tower), *planned)
    if patch.reducer.leaves_gaps and all(
        max(real) <= max(most) and sum(real) <= sum(most)
        for real, most in zip(ran, planned, strict=True)
    ):
        return ran, ran  # what is planned is the most that the data may leave
    return ran, planned
