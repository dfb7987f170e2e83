"""What one call of `get_image_features` captures of the vision tower.

Shape suffixes: R crops, P patches of one, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pumer.reducers import Plan


@dataclass(eq=False)
class Captured:
    """What is captured in one call of `get_image_features`; it ends with the call.

    Args:
        capture: the hooks that it belongs to.
        needs: fields of `Encoder` that the reducer reads.
        features_RPD: what goes into the projector.
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
    features_RPD: Tensor | None = None
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    last_heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    middle_heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    merged: list[Plan] | None = None
    packed: Any = None
