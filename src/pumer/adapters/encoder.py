"""Seam A: reduction inside the blocks of an encoder that carries text, image, or both on one token axis.

Shape suffixes: B batch, N tokens of the layer, S source tokens (unreduced), D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumer.adapters.base import Step
from pumer.reducers import Plan, Reducer, Tokens


@dataclass(frozen=True)
class Axis:
    """The token axis between two layers; handed from layer to layer, never changed in place.

    Args:
        text: text tokens, padding included.
        mask_BN: attention mask (bool; float in the published mode).
        sizes_BN: source tokens that each token stands for.
        plan: from the source tokens to these ones; None while nothing was reduced.
        grid: rows and columns of patches of the unreduced picture, None if unknown.
        patch_BS: raster number of every source token's patch, -1 for tokens that are none.
    """

    text: int
    mask_BN: Tensor
    sizes_BN: Tensor
    plan: Plan | None = None
    grid: tuple[int, int] | None = None
    patch_BS: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """(text, image) tokens."""
        return self.text, self.mask_BN.shape[1] - self.text

    def expand(self, states_BND: Tensor) -> Tensor:
        """States in the original length; dropped tokens are zeros."""
        return states_BND if self.plan is None else self.plan.expand(states_BND)


def reduce(
    reducer: Reducer,
    layer: int,
    states_BND: Tensor,
    axis: Axis,
    queries_BHNC: Tensor | None = None,
    keys_BHNC: Tensor | None = None,
    attention_BHNN: Tensor | None = None,
    cross: bool = False,
    steps: list[Step] | None = None,
) -> tuple[Tensor, Axis, Plan | None]:
    """States and axis after the reducer acted in this layer, and its plan; unchanged and None if it does not act there.

    Queries, keys, attention and `cross` are as in `Tokens`; `steps` is where the reduction is noted.
    """
    if not reducer.reduces_at(layer):
        return states_BND, axis, None
    whole = axis.plan is None
    tokens = Tokens(
        mask_BN=axis.mask_BN,
        text=axis.text,
        sizes_BN=axis.sizes_BN,
        layer=layer,
        grid=axis.grid if whole else None,
        patch_BN=axis.patch_BS if whole else None,
        states_BND=states_BND,
        queries_BHNC=queries_BHNC,
        keys_BHNC=keys_BHNC,
        attention_BHNN=attention_BHNN,
        cross=cross,
    )
    # Which tokens go is a choice, not a function to differentiate; the gradient flows through what is kept.
    with torch.no_grad():
        plan = reducer.plan(tokens)
    if steps is not None:
        steps.append(Step(layer, axis.text, plan, axis.grid, axis.patch_BS))
    text, _ = reducer.lengths(*axis.lengths, layer, grid=tokens.grid)
    reduced = replace(
        axis,
        text=text,
        mask_BN=plan.mask_BK,
        sizes_BN=plan.total(axis.sizes_BN),
        plan=plan if axis.plan is None else axis.plan.then(plan),
    )
    return plan.reduce(states_BND), reduced, plan
