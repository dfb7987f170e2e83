"""Several reducers in one model: one inside the vision tower and one after it, or one after
another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from pumer.reducers.base import EMBEDDINGS, Grid, ModelShape, Reducer, Tokens
from pumer.reducers.plan import Plan
from pumer.reducers.pumer import PuMer
from pumer.reducers.registry import register, to_dict
from pumer.reducers.simple import Unreduced
from pumer.reducers.tome import ToMe


@register
@dataclass(frozen=True)
class Compose(Reducer):
    """One reducer inside the vision tower, another one after it, as one.

    What stays of the tower's tokens, and how many patches each stands for, is what the second one
    starts from. In all else this is the second one: its layers, its lengths, its plans.

    Args:
        tower: acts in the layers of the vision tower. There is no text there, so methods guided by
            it cannot.
        inside: acts in the layers where text and image meet; None for nothing there.
    """

    name = "compose"
    tower: Reducer = field(default_factory=ToMe)
    inside: Reducer = field(default_factory=PuMer)

    def __post_init__(self) -> None:
        if self.inside is None:
            object.__setattr__(self, "inside", Unreduced())
        for role, reducer in (("tower", self.tower), ("inside", self.inside)):
            if not isinstance(reducer, Reducer):
                raise ValueError(f"{role} is a reducer, not {reducer!r}")
            if reducer.in_tower is not None:
                raise ValueError(f"{role} is itself a composition: give a single reducer")
        if isinstance(self.tower, PuMer):
            raise ValueError(
                "PuMer is guided by the text, and a vision tower has none: give `tower` ToMe, for "
                "example"
            )
        if self.tower.learned is not None:
            raise ValueError(
                f"{self.tower.name} learns where text and image meet: give `tower` ToMe, for "
                "example"
            )
        if self.tower.weighs_by_size and self.inside.learned is not None:
            raise ValueError(
                f"{self.inside.name} is trained by an attention that knows no sizes: give "
                f"{self.tower.name} proportional=False"
            )

    def resolve(self, model: ModelShape) -> Self:
        tower = self.tower
        if model.tower is not None:
            # A learned reducer is trained by an attention that knows no sizes.
            by_size = model.tower.proportional and self.inside.learned is None
            tower = tower.resolve(replace(model.tower, proportional=by_size))
        return replace(self, tower=tower, inside=self.inside.resolve(model))

    @property
    def in_tower(self) -> Reducer:
        return self.tower

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inside.layers

    @property
    def learned(self) -> Any:
        return self.inside.learned

    @property
    def after_layer(self) -> bool:
        return self.inside.after_layer

    @property
    def needs(self) -> frozenset[str]:
        return self.inside.needs

    @property
    def needs_attention(self) -> bool:
        return self.inside.needs_attention

    @property
    def reads_embeddings(self) -> bool:
        return self.inside.reads_embeddings

    @property
    def weighs_by_size(self) -> bool:
        return self.inside.weighs_by_size or self.tower.weighs_by_size

    @property
    def per_crop(self) -> bool:
        return self.inside.per_crop

    @property
    def published(self) -> bool:
        return self.inside.published

    @property
    def leaves_gaps(self) -> bool:
        return self.inside.leaves_gaps or self.tower.leaves_gaps

    def reduces_at(self, layer: int) -> bool:
        return self.inside.reduces_at(layer)

    def lengths(
        self, text: int, image: int, layer: int, prefix: int = 1, grid: Grid | None = None
    ) -> tuple[int, int]:
        return self.inside.lengths(text, image, layer, prefix, grid)

    def lengths_from(
        self,
        entered: int,
        text: int,
        image: int,
        layer: int,
        prefix: int = 1,
        grid: Grid | None = None,
    ) -> tuple[int, int]:
        return self.inside.lengths_from(entered, text, image, layer, prefix, grid)

    def plan(self, tokens: Tokens) -> Plan:
        return self.inside.plan(tokens)

    def check(self, depth: int) -> None:
        self.inside.check(depth)

    def settings(self) -> dict[str, Any]:
        return {"tower": to_dict(self.tower), "inside": to_dict(self.inside)}


@register
@dataclass(frozen=True)
class Chain(Reducer):
    """Reducers that act at different places of one token axis, such as before the language model
    and inside it.

    Each sees what those before it have left.

    Args:
        reducers: no two of them act in the same layer.
    """

    name = "chain"
    reducers: tuple[Reducer, ...]

    def __post_init__(self) -> None:
        if not self.reducers or any(not isinstance(reducer, Reducer) for reducer in self.reducers):
            raise ValueError(f"give a tuple of reducers, not {self.reducers!r}")
        if any(reducer.in_tower is not None for reducer in self.reducers):
            raise ValueError(
                "what acts inside the vision tower goes around a chain: Compose(tower, Chain(...))"
            )
        layers = [layer for reducer in self.reducers for layer in reducer.layers or ()]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ValueError(
                f"more than one reducer acts in layers {twice}: give them layers of their own"
            )
        learned = [reducer.name for reducer in self.reducers if reducer.learned is not None]
        if learned:
            raise ValueError(
                f"{', '.join(learned)} learns, which a chain has no place for: apply it by itself"
            )
        if (
            len(
                {
                    reducer.after_layer
                    for reducer in self.reducers
                    if max(reducer.layers or (0,)) >= 0
                }
            )
            > 1
        ):
            raise ValueError(
                "some of these act inside layers and some after them: chain those that do the same"
            )

    def resolve(self, model: ModelShape) -> Self:
        return replace(self, reducers=tuple(reducer.resolve(model) for reducer in self.reducers))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for reducer in self.reducers for layer in reducer.layers or ()))

    @property
    def after_layer(self) -> bool:
        return any(reducer.after_layer for reducer in self.reducers)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(reducer.needs for reducer in self.reducers))

    @property
    def needs_attention(self) -> bool:
        return any(reducer.needs_attention for reducer in self.reducers)

    @property
    def reads_embeddings(self) -> bool:
        return any(reducer.reads_embeddings for reducer in self.reducers)

    @property
    def weighs_by_size(self) -> bool:
        return any(reducer.weighs_by_size for reducer in self.reducers)

    @property
    def per_crop(self) -> bool:
        first = self._acting(EMBEDDINGS)
        return first is not None and first.per_crop

    @property
    def before_projector(self) -> bool:
        first = self._acting(EMBEDDINGS)
        return first is not None and first.before_projector

    @property
    def published(self) -> bool:
        return any(reducer.published for reducer in self.reducers)

    @property
    def leaves_gaps(self) -> bool:
        return any(reducer.leaves_gaps for reducer in self.reducers)

    def lengths(
        self, text: int, image: int, layer: int, prefix: int = 1, grid: Grid | None = None
    ) -> tuple[int, int]:
        reducer = self._acting(layer)
        return (
            (text, image) if reducer is None else reducer.lengths(text, image, layer, prefix, grid)
        )

    def lengths_from(
        self,
        entered: int,
        text: int,
        image: int,
        layer: int,
        prefix: int = 1,
        grid: Grid | None = None,
    ) -> tuple[int, int]:
        reducer = self._acting(layer)
        return (
            (text, image)
            if reducer is None
            else reducer.lengths_from(entered, text, image, layer, prefix, grid)
        )

    def plan(self, tokens: Tokens) -> Plan:
        reducer = self._acting(tokens.layer)
        return Plan.identity(tokens.mask_BN) if reducer is None else reducer.plan(tokens)

    def check(self, depth: int) -> None:
        for reducer in self.reducers:
            reducer.check(depth)

    def settings(self) -> dict[str, Any]:
        return {"reducers": [to_dict(reducer) for reducer in self.reducers]}

    def _acting(self, layer: int) -> Reducer | None:
        return next((reducer for reducer in self.reducers if reducer.reduces_at(layer)), None)
