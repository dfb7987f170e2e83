"""Two reducers in one model: the first inside the vision tower, the second where text and image meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pumer.reducers.base import Grid, Reducer, Tokens
from pumer.reducers.plan import Plan
from pumer.reducers.pumer import PuMer
from pumer.reducers.registry import register, to_dict
from pumer.reducers.tome import ToMe


@register
@dataclass(frozen=True)
class Compose(Reducer):
    """One reducer inside the vision tower, another one after it, as one.

    What stays of the tower's tokens, and how many patches each stands for, is what the second one starts from. In all
    else this is the second one: its layers, its lengths, its plans.

    Args:
        tower: acts in the layers of the vision tower. There is no text there, so methods guided by it cannot.
        inside: acts in the layers where text and image meet.
    """

    name = "compose"
    tower: Reducer = field(default_factory=ToMe)
    inside: Reducer = field(default_factory=PuMer)

    def __post_init__(self) -> None:
        for place, reducer in (("tower", self.tower), ("inside", self.inside)):
            if not isinstance(reducer, Reducer):
                raise ValueError(f"{place} is a reducer, not {reducer!r}")
            if reducer.in_tower is not None:
                raise ValueError(f"{place} is itself a composition: give a single reducer")
        if isinstance(self.tower, PuMer):
            raise ValueError("PuMer is guided by the text, and a vision tower has none: give `tower` ToMe, for example")

    @property
    def in_tower(self) -> Reducer:
        return self.tower

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inside.layers

    @property
    def needs_attention(self) -> bool:
        return self.inside.needs_attention

    @property
    def weighs_by_size(self) -> bool:
        return self.inside.weighs_by_size or self.tower.weighs_by_size

    @property
    def published(self) -> bool:
        return self.inside.published

    @property
    def leaves_gaps(self) -> bool:
        return self.inside.leaves_gaps or self.tower.leaves_gaps

    def reduces_at(self, layer: int) -> bool:
        return self.inside.reduces_at(layer)

    def lengths(self, text: int, image: int, layer: int, prefix: int = 1, grid: Grid | None = None) -> tuple[int, int]:
        return self.inside.lengths(text, image, layer, prefix, grid)

    def plan(self, tokens: Tokens) -> Plan:
        return self.inside.plan(tokens)

    def check(self, depth: int) -> None:
        self.inside.check(depth)

    def settings(self) -> dict[str, Any]:
        return {"tower": to_dict(self.tower), "inside": to_dict(self.inside)}
