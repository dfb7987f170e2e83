"""The settings that are searched: PuMer's ratios x layers x text merging, and ToMe; each x merging
in the tower."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

import pumer
from pumer.adapters import find
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.reducers import Compose, PuMer, Reducer, ToMe

_RATIOS = ("prune", "merge", "merge_text")


@dataclass
class SearchGrid:
    """Values of each setting; every combination is a point.

    Args:
        prune: shares of the image tokens to prune at each reducing layer.
        merge: shares of the image tokens to merge away there.
        merge_text: shares of the text tokens to merge away there.
        layers: lists of reducing layers; one to three in a row or every other, from early to late,
            and all, if not given.
        tower: image tokens to merge away in every layer of the vision tower, 0 for none; by default
            0, 2, 4 and 6 % of the patches where there is a tower.
        tome: image tokens to merge away in every layer, as ToMe does, in place of PuMer; 0 for
            PuMer. By default also what leaves 70, 50, 35, 20 and 10 % of the patches.
    """

    prune: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3])
    merge: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4])
    merge_text: list[float] = field(default_factory=lambda: [0.0, 0.2])
    layers: list[list[int]] | None = None
    tower: list[int] | None = None
    tome: list[int] | None = None


@dataclass(frozen=True)
class GridPoint:
    """One point of the grid: settings of PuMer or ToMe, and of ToMe in the vision tower.

    >>> GridPoint(prune=0.2, merge=0.3, merge_text=0.0, layers=(1, 3)).name
    'prune 0.2 merge 0.3 text 0 layers 1-3'
    """

    prune: float
    merge: float
    merge_text: float
    layers: tuple[int, ...]
    tower: int = 0
    tome: int = 0
    tower_depth: int = 0
    depth: int = 0
    proportional: bool = True

    @property
    def reducer(self) -> Reducer:
        """The reducer with these settings; raises ValueError for impossible ones."""
        inside: Reducer = PuMer(self.prune, self.merge, self.merge_text, self.layers)
        if self.tome:
            inside = ToMe(self.tome, self.depth, self.proportional)
        return Compose(ToMe(self.tower, self.tower_depth), inside) if self.tower else inside

    @property
    def name(self) -> str:
        """The settings in one line."""
        layers = "-".join(map(str, self.layers))
        tower = f" tower {self.tower}" if self.tower else ""
        if self.tome:
            return f"ToMe {self.tome}{tower}"
        return (
            f"prune {self.prune:g} merge {self.merge:g} text {self.merge_text:g} layers "
            f"{layers}{tower}"
        )


@dataclass(frozen=True)
class Space:
    """The points of a grid that a model can be reduced by.

    Args:
        axes: every setting's values, in rising order (schedules from early to late).
        points: the possible combinations.
        impossible: the others, by name, with the reason.
    """

    axes: dict[str, list[Any]]
    points: tuple[GridPoint, ...]
    impossible: dict[str, str]

    def indices(self, point: GridPoint) -> dict[str, int]:
        """Index of a point on each axis."""
        pumers = (*_RATIOS, "layers") if point.tome else ()  # which have no place there
        return {
            name: 0 if name in pumers else values.index(getattr(point, name))
            for name, values in self.axes.items()
        }


def space(grid: SearchGrid, model: nn.Module, skip_impossible: bool = False) -> Space:
    """All points of a grid for a model.

    Args:
        grid: values of each setting.
        model: the model to reduce, unpatched before and after.
        skip_impossible: skip settings that the model does not support, instead of refusing them.

    Raises:
        ValueError: for unsupported settings, naming them, and for an empty search space.
    """
    adapter = find(model)
    decoder = isinstance(
        adapter, DecoderAdapter
    )  # with nothing to save in the last layer, and no count of sizes
    fixed: dict[str, Any] = {
        "tower_depth": adapter.tower_depth(model),
        "depth": adapter.depth(model) - int(decoder),
        "proportional": not decoder,
    }
    axes: dict[str, list[Any]] = {
        "prune": sorted(set(grid.prune)),
        "merge": sorted(set(grid.merge)),
        "merge_text": sorted(set(grid.merge_text)),
        "layers": [
            tuple(x)
            for x in (schedules(adapter.depth(model)) if grid.layers is None else grid.layers)
        ],
        "tower": sorted(set(_tower_steps(model) if grid.tower is None else grid.tower)),
        "tome": sorted(set(_tome_steps(model, fixed["depth"]) if grid.tome is None else grid.tome)),
    }
    empty = [name for name, values in axes.items() if not values]
    if not all(axes["layers"]):
        raise ValueError(
            "a list of layers in the grid is empty: name the layers that reduce, for example [[1, "
            "3]]"
        )
    if empty:
        raise ValueError(f"the grid has no values for {', '.join(empty)}: give one or more")
    points, impossible = [], {}
    for values in _combinations(axes):
        point = GridPoint(**values, **fixed)
        try:
            pumer.apply(model, point.reducer)
            points.append(point)
        except ValueError as error:
            impossible[point.name] = str(error)
        finally:
            pumer.remove(model)
    if impossible and not skip_impossible:
        name, reason = next(iter(impossible.items()))
        raise ValueError(
            f"{len(impossible)} settings of the grid are impossible "
            f"({', '.join(list(impossible)[:5])}{', ...' if len(impossible) > 5 else ''}); of "
            f"{name}: {reason}. Change the grid, or skip them with --skip_impossible true"
        )
    if not points:
        raise ValueError(
            "no setting of the grid reduces anything: give ratios above 0 that fit the model"
        )
    return Space(axes, tuple(points), impossible)


def _combinations(axes: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The settings of every point that reduces something, each once."""
    first = axes["layers"][0]
    for values in itertools.product(*axes.values()):
        combination = dict(zip(axes, values, strict=True))
        ours = any(combination[name] for name in _RATIOS)
        if not combination["tome"] and (
            ours or (combination["tower"] and combination["layers"] == first)
        ):
            yield combination
    for tower, tome in itertools.product(axes["tower"], filter(None, axes["tome"])):
        yield dict.fromkeys(_RATIOS, 0.0) | {"layers": first, "tower": tower, "tome": tome}


def dominates(points: Sequence[GridPoint]) -> np.ndarray:
    """Which points reduce no more than others: bool [N, N], row against column, False on the
    diagonal.

    True where no ratio of the row's point is higher and it has reduced no more often at any depth.
    This is a partial order: of two points, neither may dominate.

    >>> mild = GridPoint(prune=0.1, merge=0.0, merge_text=0.0, layers=(2,))
    >>> harsh = GridPoint(prune=0.2, merge=0.0, merge_text=0.0, layers=(1, 2))
    >>> dominates([mild, harsh]).tolist()
    [[False, True], [False, False]]
    """
    last = max(layer for point in points for layer in point.layers)
    columns = [[getattr(p, name) for p in points] for name in (*_RATIOS, "tower", "tome")]
    columns += [
        [sum(layer <= depth for layer in p.layers) for p in points] for depth in range(last + 1)
    ]
    less = ~np.eye(len(points), dtype=bool)
    for values in map(np.array, columns):
        less &= values[:, None] <= values[None, :]
    return less


def schedules(depth: int) -> list[tuple[int, ...]]:
    """Schedules of one, two and three reducing layers a sixth of the depth apart, and of all of
    them.

    >>> schedules(6)[:4]
    [(0,), (0, 1), (0, 1, 2), (1,)]
    """
    step = max(1, round(depth / 6))
    starts = range(step - 1 if step > 1 else 0, depth - 1, step)
    few = [
        tuple(range(start, start + count * step, step))
        for start in starts
        for count in (1, 2, 3)
        if start + (count - 1) * step < depth
    ]
    return list(dict.fromkeys([*few, tuple(starts)]))


def _tome_steps(model: nn.Module, depth: int) -> list[int]:
    """0, and the `r` that keep 70, 50, 35, 20 and 10 % of the patches after all layers."""
    rows, columns = find(model).default_grid(model)
    return sorted(
        {
            max(0, round((1 - share) * rows * columns / depth))
            for share in (1.0, 0.7, 0.5, 0.35, 0.2, 0.1)
        }
    )


def _tower_steps(model: nn.Module) -> list[int]:
    adapter = find(model)
    if not adapter.tower_depth(model):
        return [0]
    rows, columns = adapter.default_grid(model)
    return sorted({round(share * rows * columns) for share in (0.0, 0.02, 0.04, 0.06)})
