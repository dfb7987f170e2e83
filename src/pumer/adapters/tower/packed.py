"""How patches lie in a vision transformer that takes images of any size, one behind the other in a
single row; see `axis.Rows` for the other way, and for the words.

Attention is within images, or within windows of them; how many tokens each has left, the host keeps
count of.

Shape suffixes: B images, U units, K slots of a plan, D channels, H heads, C channels of a head, S
patches of all images in one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder.reduce import EncoderLayout, first_sources
from pumer.adapters.tower.axis import layout_of, square_order
from pumer.adapters.tower.blocks import Positions
from pumer.reducers import Plan
from pumer.reducers.plan import tokens_at
from pumer.reducers.tokens import Grid


@dataclass(frozen=True)
class Packed:
    """Images of any size, one behind the other.

    Args:
        unit: patches of a unit.
        entered: units of every image before the first layer, on the host.
        lengths: those that are left.
        order_S: index of every patch in the tower's own order, where that has not the patches of
            a unit side by side; None where it has.
        window_BU: the window of every unit that entered; None without windows.
        windows: units left in every window, empty ones left out; none without windows.
    """

    unit: int
    entered: tuple[int, ...]
    lengths: tuple[int, ...]
    order_S: Tensor | None = None
    window_BU: Tensor | None = None
    windows: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        grids: Sequence[Grid],
        unit: int,
        grouped: bool,
        windows: Sequence[int],
        device: torch.device,
    ) -> Packed:
        """The axis of a tower's embeddings.

        Args:
            grids: rows and columns of units of every image.
            unit: patches of a unit, a square.
            grouped: whether the tower has them side by side; otherwise rows of patches.
            windows: units in every window; none without windows.
            device: of the tower.
        """
        lengths = tuple(rows * columns for rows, columns in grids)
        order_S = None if grouped or unit == 1 else _square_orders(grids, unit).to(device)
        if not windows:
            return cls(unit, lengths, lengths, order_S)
        window_S = torch.arange(len(windows)).repeat_interleave(torch.tensor(windows))
        window_BU = pad_sequence(list(window_S.split(lengths)), batch_first=True)
        return cls(unit, lengths, lengths, order_S, window_BU.to(device), tuple(windows))

    def layout(self, states_SD: Tensor, grid: Grid | None, _: Tensor | None) -> EncoderLayout:
        """The layout of the units before the first layer, an image to a row."""
        length_B1 = torch.tensor(self.lengths, device=states_SD.device)[:, None]
        units_U = torch.arange(max(self.lengths), device=states_SD.device)
        return layout_of(units_U < length_B1, grid, 0)

    def enter(self, states_SD: Tensor) -> Tensor:
        """Embeddings with the patches of every unit side by side."""
        return states_SD if self.order_S is None else states_SD[self.order_S]

    def leave(self, states_SD: Tensor, plan: Plan | None) -> Tensor:
        """States of every patch, in the order of the tower: those of its slot."""
        width = states_SD.shape[1]
        states_SD = self.leave_units(states_SD.reshape(-1, self.unit * width), plan)
        states_SD = states_SD.reshape(-1, width)
        return states_SD if self.order_S is None else states_SD[self.order_S.argsort()]

    def leave_units(self, features_UD: Tensor, plan: Plan | None) -> Tensor:
        """The same of what has one vector for every unit, in the order of units."""
        if plan is None:
            return features_UD
        return _flat(plan.expand(_rows(features_UD, self.lengths)), self.entered)

    def means(self, states_SD: Tensor) -> Tensor:
        """The mean of every unit's patches [B,U,D]."""
        return _rows(states_SD.unflatten(0, (-1, self.unit)).mean(1), self.lengths)

    def head_means(self, x_1HSC: Tensor) -> Tensor:
        """The same of every head's queries or keys [B,H,U,C]."""
        by_patch = x_1HSC[0].transpose(0, 1)
        return self.means(by_patch.flatten(1)).unflatten(2, by_patch.shape[1:]).transpose(1, 2)

    def bias(self, layout: EncoderLayout, dtype: torch.dtype, by_size: bool) -> Tensor | None:
        """What is added to the logits of every patch as a key [S]; None if nothing is."""
        if not by_size:
            return None
        sizes_U = _flat(layout.sizes_BN[..., None], self.lengths)[:, 0]
        return sizes_U.clamp_min(1e-6).log().to(dtype).repeat_interleave(self.unit)

    def attend(
        self,
        queries_1HSC: Tensor,
        keys_1HSC: Tensor,
        values_1HSC: Tensor,
        bias_S: Tensor | None,
        backend: str,
        dropout: float,
        probabilities: bool,
        windowed: bool = False,
    ) -> tuple[Tensor, None]:
        """The attention's context [S,H*C], of every image or window by itself."""
        lengths = [self.unit * count for count in (self.windows if windowed else self.lengths)]
        tensors = (queries_1HSC, keys_1HSC, values_1HSC)
        if len(set(lengths)) == 1:  # all at once, a row for each
            rows = [x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in tensors]
            bias = None if bias_S is None else bias_S.view(len(lengths), 1, 1, -1)
            context, _ = kernels.attend(rows[0], rows[1], rows[2], bias, backend, dropout)
            return context.transpose(1, 2).flatten(0, 1).flatten(1), None
        biases: Sequence[Tensor | None] = [None] * len(lengths)
        if bias_S is not None:
            biases = bias_S[None].split(lengths, 1)
        parts = []
        pieces = (x.split(lengths, 2) for x in tensors)
        for queries, keys, values, bias in zip(*pieces, biases, strict=True):
            context, _ = kernels.attend(queries, keys, values, bias, backend, dropout)
            parts.append(context[0].transpose(0, 1).flatten(1))
        return torch.cat(parts), None

    def positions(self, positions: Positions | None, plan: Plan | None) -> Positions | None:
        """Rotary embeddings of the tokens left: a merged one has those of its first member."""
        if positions is None:
            return None
        cos, sin = (self.enter(each) for each in positions)
        if plan is None:
            return cos, sin
        first_BK = first_sources(plan).clamp_max(plan.slot_BN.shape[1] - 1)

        def left(x_SC: Tensor) -> Tensor:
            rows = _rows(x_SC.reshape(-1, self.unit * x_SC.shape[1]), self.entered)
            return _flat(tokens_at(rows, first_BK), self.lengths).reshape(-1, x_SC.shape[1])

        return left(cos), left(sin)

    def reduced(
        self, states_SD: Tensor, plan: Plan, layout: EncoderLayout
    ) -> tuple[Tensor, EncoderLayout, Packed]:
        """States, layout and axis after a plan for the units; `layout` is that of the plan."""
        rows = _rows(states_SD.reshape(-1, self.unit * states_SD.shape[1]), self.lengths)
        rows, axis = plan.reduce(rows), self
        if self.window_BU is not None:
            layout, order_BK, windows = self._by_window(layout)
            rows, axis = tokens_at(rows, order_BK), replace(axis, windows=windows)
        lengths = tuple(layout.mask_BN.sum(1).tolist())
        layout = _cut(layout, max(lengths))
        states_SD = _flat(rows, lengths).reshape(-1, states_SD.shape[1])
        return states_SD, layout, replace(axis, lengths=lengths)

    def _by_window(self, layout: EncoderLayout) -> tuple[EncoderLayout, Tensor, tuple[int, ...]]:
        """The layout with slots in the order of their first members, which says whose window they
        are in; the order; and how many each window has."""
        assert layout.plan is not None
        assert self.window_BU is not None
        count = layout.plan.slot_BN.shape[1]
        first_BK = first_sources(layout.plan).masked_fill(~layout.mask_BN, count)
        first_BK, order_BK = first_BK.sort(1)
        order = Plan.select(order_BK, layout.mask_BN, layout.mask_BN.shape[1])
        sizes_BK = layout.sizes_BN.gather(1, order_BK)
        layout = replace(layout, plan=layout.plan.then(order), sizes_BN=sizes_BK)
        window_BK = self.window_BU.gather(1, first_BK.clamp_max(count - 1))
        num_windows = int(self.window_BU.max()) + 1
        # Empty slots count in a window too many.
        window_BK = window_BK.masked_fill(first_BK == count, num_windows)
        counts = window_BK.flatten().bincount(minlength=num_windows + 1).tolist()[:-1]
        return layout, order_BK, tuple(filter(None, counts))


def _cut(layout: EncoderLayout, slots: int) -> EncoderLayout:
    """The layout with fewer slots, where the others are empty."""
    assert layout.plan is not None
    return replace(
        layout,
        mask_BN=layout.mask_BN[:, :slots],
        sizes_BN=layout.sizes_BN[:, :slots],
        plan=layout.plan.cut(0, (0, slots)),
    )


def _rows(x_UD: Tensor, lengths: Sequence[int]) -> Tensor:
    """A row for every image [B,U,D], with zeros behind the shorter ones."""
    if len(set(lengths)) == 1:
        return x_UD.unflatten(0, (len(lengths), -1))
    return pad_sequence(list(x_UD.split(list(lengths))), batch_first=True)


def _flat(x_BUD: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of all images one behind the other, without what is behind the shorter ones."""
    if len(set(lengths)) == 1:
        return x_BUD[:, : lengths[0]].flatten(0, 1)
    return torch.cat([row[:length] for row, length in zip(x_BUD, lengths, strict=True)])


def _square_orders(grids: Sequence[Grid], unit: int) -> Tensor:
    """`square_order` of the patches of every image, counted on."""
    side, orders, before = math.isqrt(unit), [], 0
    for rows, columns in grids:
        orders.append(before + square_order((rows * side, columns * side), unit))
        before += rows * columns * unit
    return torch.cat(orders)
