"""What one call of `get_image_features` captures of the vision tower.

Shape suffixes: R crops, P patches of one, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pumer.reducers import Plan


@dataclass(eq=False)
class Captured:
    """What is captured in one call of `get_image_features`; it ends with the call.

    Args:
        capture: the hooks that it belongs to.
        needs: fields of `Encoder` that the reducer reads.
        features: what goes into the projector [R,P,D], at every call of it.
        heads: queries and keys [R,H,P,C] of the layer that the features come from, one pair for
            each state of its attention.
        last_heads: those of the tower's last layer, where that is another one.
        middle_heads: those of `Traits.middle_layer`, where that is another one.
        inputs: what `get_image_features` was called with.
        plan: by which they were merged before the projector.
        merged: where the patches of every crop went, if they were merged in the tower or behind it:
            plans of one row.
        packed: how a family puts its crops together.
    """

    capture: object
    needs: frozenset[str]
    features: list[Tensor] = field(default_factory=list)
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    last_heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    middle_heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    merged: list[Plan] | None = None
    packed: Any = None

    @property
    def features_RPD(self) -> Tensor | None:
        """What went into the projector at last."""
        return self.features[-1] if self.features else None

    def of_view(self, index: int) -> Captured:
        """What is captured of one of the views of images that go through the tower one by one."""
        part = slice(index, index + 1)
        return replace(
            self,
            features=self.features[part],
            heads=self.heads[part],
            last_heads=self.last_heads[part],
            middle_heads=self.middle_heads[part],
        )
