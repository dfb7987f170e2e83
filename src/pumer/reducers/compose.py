"""Several reducers in one model: `Compose` for the vision tower and after it, `Chain` in turn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from pumer.reducers.base import ModelShape, Reducer, Traits
from pumer.reducers.plan import Plan
from pumer.reducers.pumer import PuMer
from pumer.reducers.registry import register, to_dict
from pumer.reducers.simple import Unreduced
from pumer.reducers.tokens import EMBEDDINGS, Tokens, TokenShape
from pumer.reducers.tome import ToMe


@register
@dataclass(frozen=True)
class Compose(Reducer):
    """One reducer inside the vision tower, and another one after it.

    The second one starts from the tower's remaining tokens and their sizes. Layers, lengths and
    plans of the composition are those of the second one.

    Args:
        tower: acts in the layers of the vision tower, where there is no text to guide it.
        inside: acts in the layers where text and image meet; None for no reduction there.

    Example:
        >>> reducer = pumer.Compose(tower=pumer.ToMe(r=2), inside=pumer.FastV(keep=0.5, layer=1))
        >>> llava = pumer.apply(llava, reducer)
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
            if reducer.traits.vision_reducer is not None:
                raise ValueError(f"{role} is itself a composition: give a single reducer")
        if self.tower.traits.needs_text:
            raise ValueError(
                f"{self.tower.name} is guided by the text, and a vision tower has none: give "
                "tower=ToMe(), for example"
            )
        if self.tower.traits.needs_input or self.tower.traits.drops_image:
            raise ValueError(
                f"{self.tower.name} acts in a language model, not in a vision tower: "
                "set `inside` to it"
            )
        if self.tower.traits.learned is not None:
            raise ValueError(
                f"{self.tower.name} learns where text and image meet: give `tower` ToMe, for "
                "example"
            )
        if self.tower.traits.proportional_attention and self.inside.traits.learned is not None:
            raise ValueError(
                f"{self.inside.name} is trained by an attention that knows no sizes: give "
                f"{self.tower.name} proportional=False"
            )

    def resolve(self, model: ModelShape) -> Self:
        tower = self.tower
        if model.tower is not None:
            # Training a learned reducer does not support proportional attention.
            by_size = model.tower.proportional and self.inside.traits.learned is None
            tower = tower.resolve(replace(model.tower, proportional=by_size))
        return replace(self, tower=tower, inside=self.inside.resolve(model))

    @property
    def traits(self) -> Traits:
        inside, tower = self.inside.traits, self.tower.traits
        return replace(
            inside,
            vision_reducer=self.tower,
            dynamic_length=inside.dynamic_length or tower.dynamic_length,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inside.layers

    def reduces_at(self, layer: int) -> bool:
        return self.inside.reduces_at(layer)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return self.inside.lengths(shape)

    def plan(self, tokens: Tokens) -> Plan:
        return self.inside.plan(tokens)

    def check(self, depth: int) -> None:
        self.inside.check(depth)

    def settings(self) -> dict[str, Any]:
        return {"tower": to_dict(self.tower), "inside": to_dict(self.inside)}


@register
@dataclass(frozen=True)
class Chain(Reducer):
    """Reducers that act in different layers, such as before the language model and inside it.

    Each reduces what the ones before have left.

    Args:
        reducers: in any order; no two of them act in the same layer.

    Example:
        >>> reducers = pumer.DivPrune(keep=0.5), pumer.FastV(keep=0.5, layer=1)
        >>> llava = pumer.apply(llava, pumer.Chain(reducers))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "chain"
    reducers: tuple[Reducer, ...]

    def __post_init__(self) -> None:
        if not self.reducers or any(not isinstance(reducer, Reducer) for reducer in self.reducers):
            raise ValueError(f"give a tuple of reducers, not {self.reducers!r}")
        if any(reducer.traits.vision_reducer is not None for reducer in self.reducers):
            raise ValueError(
                "what acts inside the vision tower goes around a chain: Compose(tower, Chain(...))"
            )
        layers = [layer for reducer in self.reducers for layer in reducer.layers or ()]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ValueError(
                f"more than one reducer acts in layers {twice}: give them different layers"
            )
        learned = [reducer.name for reducer in self.reducers if reducer.traits.learned is not None]
        if learned:
            raise ValueError(
                f"{', '.join(learned)} learns, which a chain does not support: apply it alone"
            )
        if (
            len(
                {
                    reducer.traits.post_layer
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
    def traits(self) -> Traits:
        # Crops and projector come before the first layer: only the reducer there decides on them.
        first = self._acting(EMBEDDINGS)
        at_entry = Traits() if first is None else first.traits
        return replace(
            Traits.union(reducer.traits for reducer in self.reducers),
            per_crop=at_entry.per_crop,
            before_projector=at_entry.before_projector,
        )

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        reducer = self._acting(shape.layer)
        return shape.unchanged if reducer is None else reducer.lengths(shape)

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
