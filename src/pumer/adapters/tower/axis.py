"""How the patches of images lie in a vision transformer whose images are rows of a batch.

A unit is what a reducer sees as one token: a patch, or the square of patches that becomes one token
behind the tower, which are side by side then. `packed.Packed` is the other way, of images of any
size one behind the other in a single row.

Shape suffixes: B images, N tokens of the tower ([CLS] and patches), U units with structure tokens
before them, P patches, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.tower.blocks import Positions
from pumer.reducers import Plan
from pumer.reducers.tokens import Grid


@dataclass(frozen=True)
class Rows:
    """Every image is a row of as many tokens.

    Args:
        num_prefix_tokens: structure tokens at the head of a row, such as [CLS].
        unit: patches of a unit.
        order_P: raster index of every patch, where units are squares; None in raster order.
    """

    num_prefix_tokens: int
    unit: int = 1
    order_P: Tensor | None = None

    @classmethod
    def of(cls, states_BND: Tensor, num_prefix_tokens: int, unit: int) -> Rows:
        """The axis of a tower's embeddings; units are squares of a square image."""
        if unit == 1:
            return cls(num_prefix_tokens)
        side = math.isqrt(states_BND.shape[1] - num_prefix_tokens)
        order_P = square_order((side, side), unit).to(states_BND.device)
        return cls(num_prefix_tokens, unit, order_P)

    def layout(
        self, states_BND: Tensor, grid: Grid | None, mask_BP: Tensor | None
    ) -> EncoderLayout:
        """The layout of the units before the first layer; `mask_BP` is false for padding."""
        batch, count, _ = states_BND.shape
        units = (count - self.num_prefix_tokens) // self.unit
        mask_BU = torch.ones(
            batch, self.num_prefix_tokens + units, dtype=torch.bool, device=states_BND.device
        )
        if mask_BP is not None:
            mask_BP = mask_BP.bool() if self.order_P is None else mask_BP.bool()[:, self.order_P]
            real_BU = mask_BP.unflatten(1, (-1, self.unit)).any(2)
            mask_BU = torch.cat([mask_BU[:, : self.num_prefix_tokens], real_BU], 1)
        return layout_of(mask_BU, grid, self.num_prefix_tokens, mask_BP is not None)

    def enter(self, states_BND: Tensor) -> Tensor:
        """Embeddings with the patches of every unit side by side."""
        return self._ordered(states_BND, self.order_P)

    def leave(self, states_BND: Tensor, plan: Plan | None) -> Tensor:
        """States of every token of the tower, in its order: each has those of its slot."""
        if plan is not None:
            head, folded = self._folded(states_BND)
            states_BND = self._unfolded(head, plan.tail(self.num_prefix_tokens).expand(folded))
        return self._ordered(states_BND, None if self.order_P is None else self.order_P.argsort())

    def means(self, states_BND: Tensor) -> Tensor:
        """The mean of every unit's patches [B,U,D]; axes behind the first two are free."""
        if self.unit == 1:
            return states_BND
        head = states_BND[:, : self.num_prefix_tokens]
        patches = states_BND[:, self.num_prefix_tokens :].unflatten(1, (-1, self.unit))
        return torch.cat([head, patches.mean(2)], 1)

    def head_means(self, x_BHNC: Tensor) -> Tensor:
        """The same of every head's queries or keys."""
        return x_BHNC if self.unit == 1 else self.means(x_BHNC.transpose(1, 2)).transpose(1, 2)

    def bias(self, layout: EncoderLayout, dtype: torch.dtype, by_size: bool) -> Tensor:
        """The attention mask of the tokens [B,1,1,N], see `kernels.attention_bias`."""
        mask_BU, sizes_BU = layout.mask_BN, layout.sizes_BN if by_size else None
        if self.unit > 1:
            mask_BU = self._spread(mask_BU)
            sizes_BU = None if sizes_BU is None else self._spread(sizes_BU)
        return kernels.attention_bias(mask_BU, sizes_BU, dtype)

    def attend(
        self,
        queries_BHNC: Tensor,
        keys_BHNC: Tensor,
        values_BHNC: Tensor,
        bias_B11N: Tensor | None,
        backend: str,
        dropout: float,
        probabilities: bool,
        windowed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's context [B,N,H*C], and its probabilities where they are asked for."""
        context, attention = kernels.attend(
            queries_BHNC, keys_BHNC, values_BHNC, bias_B11N, backend, dropout, probabilities
        )
        return context.transpose(1, 2).flatten(2), attention

    def positions(self, positions: Positions | None, plan: Plan | None) -> Positions | None:
        """Rotary embeddings of the tokens left."""
        assert positions is None, "images in rows have no rotary embeddings"
        return None

    def reduced(
        self, states_BND: Tensor, plan: Plan, layout: EncoderLayout
    ) -> tuple[Tensor, EncoderLayout, Rows]:
        """States, layout and axis after a plan for the units; `layout` is that of the plan."""
        if self.unit == 1:
            return plan.reduce(states_BND), layout, self
        head, folded = self._folded(states_BND)
        folded = plan.tail(self.num_prefix_tokens).reduce(folded)
        return self._unfolded(head, folded), layout, self

    def _ordered(self, states_BND: Tensor, order_P: Tensor | None) -> Tensor:
        if order_P is None:
            return states_BND
        head = states_BND[:, : self.num_prefix_tokens]
        return torch.cat([head, states_BND[:, self.num_prefix_tokens :][:, order_P]], 1)

    def _folded(self, states_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Structure tokens, and the patches of every unit as one vector."""
        head, patches = states_BND.tensor_split([self.num_prefix_tokens], 1)
        return head, patches.reshape(len(patches), -1, self.unit * patches.shape[2])

    def _unfolded(self, head: Tensor, folded: Tensor) -> Tensor:
        patches = folded.unflatten(2, (self.unit, -1)).flatten(1, 2)
        return torch.cat([head, patches], 1) if head.shape[1] else patches

    def _spread(self, x_BU: Tensor) -> Tensor:
        """Values of units for each of their patches."""
        head, units = x_BU.tensor_split([self.num_prefix_tokens], 1)
        return torch.cat([head, units.repeat_interleave(self.unit, 1)], 1)


def layout_of(
    mask_BU: Tensor, grid: Grid | None, num_prefix_tokens: int, padded: bool = False
) -> EncoderLayout:
    """The layout of units before anything is reduced."""
    raster_U = torch.arange(mask_BU.shape[1], device=mask_BU.device) - num_prefix_tokens
    patch_BU = raster_U.clamp_min(-1).expand(mask_BU.shape)
    sizes_BU = torch.ones(mask_BU.shape, device=mask_BU.device)
    return EncoderLayout(
        0,
        mask_BU,
        sizes_BU,
        None,
        grid,
        patch_BU,
        num_prefix_tokens=num_prefix_tokens,
        padded=padded,
    )


def square_order(grid: Grid, unit: int) -> Tensor:
    """Raster index of every patch of a grid, squares of `unit` patches one after the other."""
    (rows, columns), side = grid, math.isqrt(unit)
    raster = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
    return raster.transpose(1, 2).flatten()
