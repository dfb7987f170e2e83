"""`ReductionStep`: one reduction of a forward, as `pumer.trace` records it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pumer.reducers import Plan


@dataclass(frozen=True)
class ReductionStep:
    """One reduction of a forward, recorded for inspection.

    Args:
        layer: index of the layer, -1 before the first.
        text: text tokens before the reduction, padding included.
        plan: where the tokens went.
        grid: rows and columns of patches of the unreduced image.
        patch_BN: raster index of the patch of every unreduced token, -1 for tokens that are no
            patch.
        prompt: the state of a decoder's prompt, a `prompt.PromptStep`; None in encoders.
    """

    layer: int
    text: int
    plan: Plan
    grid: tuple[int, int] | None
    patch_BN: Any
    prompt: Any = None
