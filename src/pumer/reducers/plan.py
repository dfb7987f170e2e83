"""`Plan`: where every token of a layer goes.

Shape suffixes: B batch, N source tokens, K slots (tokens after the reduction), D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumer.reducers.ops.blocks import row_blocks

DROPPED = -1


@dataclass(frozen=True)
class Plan:
    """For each source token its slot and its weight in it; applies to any tensor with a token axis.

    Args:
        slot_BN: int64, the slot of every source token, `DROPPED` (-1) if it goes nowhere.
        weight_BN: float32, the weight of a source in its slot. The weights of a slot sum to one,
            except where a published method adds instead of averaging.
        mask_BK: attention mask of the slots: bool, true for slots in use; float where a published
            method works with fractional masks.
        index_BK: for plans that only select, the source of every slot; `reduce` then gathers, bit
            for bit.
        shares_BKN: for plans where a source enters several slots, the weight of every source in
            every slot: `reduce` is the product with it. `slot_BN` then is the slot that represents
            the source.
        carried_BN: float32, a value of every source that the reducer wants to see again: the next
            layer that it acts in gets each slot's sum in `Tokens.carried_BN`. Only plans of whole
            layers have it, as `Reducer.plan` returns them.

    Example:
        >>> keep = pumer.Plan.keep(torch.tensor([[True, False, True]]), slots=2)
        >>> keep.reduce(torch.tensor([[5.0, 6.0, 7.0]]))
        tensor([[5., 7.]])
    """

    slot_BN: Tensor
    weight_BN: Tensor
    mask_BK: Tensor
    index_BK: Tensor | None = None
    shares_BKN: Tensor | None = None
    carried_BN: Tensor | None = None

    @staticmethod
    def identity(mask_BN: Tensor) -> Plan:
        """The plan that keeps all tokens, with the given mask."""
        positions = torch.arange(mask_BN.shape[1], device=mask_BN.device).expand(mask_BN.shape)
        return Plan(positions, _ones(mask_BN.shape, mask_BN.device), mask_BN, positions)

    @staticmethod
    def select(index_BK: Tensor, mask_BK: Tensor, count: int) -> Plan:
        """Keep the given ones of `count` source tokens, in the given order.

        The index of a slot that `mask_BK` marks empty is ignored.
        """
        batch, slots = index_BK.shape
        numbers = torch.arange(slots, device=index_BK.device).expand(batch, slots)
        # Empty slots write into an extra column, which is cut off.
        target = torch.where(mask_BK.bool(), index_BK, torch.full_like(index_BK, count))
        slot_BN = torch.full((batch, count + 1), DROPPED, device=index_BK.device, dtype=torch.int64)
        slot_BN = slot_BN.scatter(1, target, numbers)[:, :count]
        return Plan(slot_BN, _ones(slot_BN.shape, slot_BN.device), mask_BK, index_BK)

    @staticmethod
    def keep(keep_BN: Tensor, slots: int) -> Plan:
        """Keep the marked tokens in their order, at most the first `slots` of a row."""
        # The slot of every kept token, in order.
        place_BN = keep_BN.long().cumsum(1) - 1
        keep_BN = keep_BN & (place_BN < slots)
        slot_BN = torch.where(keep_BN, place_BN, DROPPED)
        positions = torch.arange(keep_BN.shape[1], device=keep_BN.device).expand(keep_BN.shape)
        # The source of every slot; tokens that are not kept write into an extra column.
        index_BK = torch.zeros(
            keep_BN.shape[0], slots + 1, device=keep_BN.device, dtype=torch.int64
        )
        index_BK = index_BK.scatter(1, torch.where(keep_BN, slot_BN, slots), positions)[:, :slots]
        mask_BK = torch.arange(slots, device=keep_BN.device) < keep_BN.sum(1, keepdim=True)
        return Plan(slot_BN, _ones(slot_BN.shape, slot_BN.device), mask_BK, index_BK)

    @staticmethod
    def merge(slot_BN: Tensor, mask_BK: Tensor, sizes_BN: Tensor) -> Plan:
        """Average the tokens of each slot, weighted by their sizes."""
        # Total size of every slot, and each token's share of it.
        slots = mask_BK.shape[1]
        target = torch.where(slot_BN < 0, slots, slot_BN)
        total_BK = torch.zeros(
            slot_BN.shape[0], slots + 1, device=slot_BN.device, dtype=sizes_BN.dtype
        )
        total_BK = total_BK.scatter_add(1, target, sizes_BN)
        return Plan(slot_BN, sizes_BN / total_BK.gather(1, target).clamp_min(1e-12), mask_BK)

    @staticmethod
    def side_by_side(plans: Sequence[Plan]) -> Plan:
        """One plan for concatenated token axes, such as text and image."""
        if len(plans) == 1:
            return plans[0]
        # Slots and sources of each plan come after those of the plans before.
        slots, indices = [], []
        tokens = offset = 0
        for plan in plans:
            slots.append(torch.where(plan.slot_BN < 0, DROPPED, plan.slot_BN + offset))
            indices.append(None if plan.index_BK is None else plan.index_BK + tokens)
            tokens += plan.slot_BN.shape[1]
            offset += plan.slots
        only_selects = [index for index in indices if index is not None]
        shares_BKN = None
        if any(plan.shares_BKN is not None for plan in plans):
            shares_BKN = _block_diagonal([plan.matrix() for plan in plans])
        return Plan(
            torch.cat(slots, 1),
            torch.cat([plan.weight_BN for plan in plans], 1),
            torch.cat([plan.mask_BK for plan in plans], 1),
            torch.cat(only_selects, 1) if len(only_selects) == len(plans) else None,
            shares_BKN,
        )

    @property
    def slots(self) -> int:
        """Number of slots K: the length of the token axis after the plan, padding included."""
        return self.mask_BK.shape[1]

    def to(self, device: torch.device) -> Plan:
        """The plan on another device."""
        index = None if self.index_BK is None else self.index_BK.to(device)
        shares = None if self.shares_BKN is None else self.shares_BKN.to(device)
        slot, weight, mask = (x.to(device) for x in (self.slot_BN, self.weight_BN, self.mask_BK))
        return Plan(slot, weight, mask, index, shares)

    def rows(self, index: Any) -> Plan:
        """The plan of some rows of the batch; `index` as for a tensor."""
        kept = None if self.index_BK is None else self.index_BK[index]
        shares = None if self.shares_BKN is None else self.shares_BKN[index]
        return Plan(self.slot_BN[index], self.weight_BN[index], self.mask_BK[index], kept, shares)

    def averaging(self) -> Plan:
        """The same groups with equal weights, so that equal members give one of them."""
        ones_BN = torch.ones_like(self.weight_BN)
        total_BK = self.total(ones_BN)
        weight_BN = ones_BN / total_BK.gather(1, self.slot_BN.clamp_min(0)).clamp_min(1)
        return Plan(self.slot_BN, weight_BN, self.mask_BK)

    def head(self, tokens: int, slots: int) -> Plan:
        """The plan of the first source tokens, if exactly these go into the first slots."""
        index = None if self.index_BK is None else self.index_BK[:, :slots]
        shares = None if self.shares_BKN is None else self.shares_BKN[:, :slots, :tokens]
        slot_BN, weight_BN = self.slot_BN[:, :tokens], self.weight_BN[:, :tokens]
        return Plan(slot_BN, weight_BN, self.mask_BK[:, :slots], index, shares)

    def tail(self, first: int, slots: int | None = None) -> Plan:
        """The plan without the first source tokens, if exactly these go into the first slots: as
        many as they are, unless `slots` says how many."""
        skip = first if slots is None else slots
        index = None if self.index_BK is None else self.index_BK[:, skip:] - first
        shares = None if self.shares_BKN is None else self.shares_BKN[:, skip:, first:]
        slot_BN = torch.where(self.slot_BN < 0, DROPPED, self.slot_BN - skip)[:, first:]
        return Plan(slot_BN, self.weight_BN[:, first:], self.mask_BK[:, skip:], index, shares)

    @staticmethod
    def stack(plans: Sequence[Plan]) -> Plan:
        """One plan for concatenated batches of as many tokens and slots."""
        indices = [plan.index_BK for plan in plans if plan.index_BK is not None]
        mixed = any(plan.shares_BKN is not None for plan in plans)
        return Plan(
            torch.cat([plan.slot_BN for plan in plans]),
            torch.cat([plan.weight_BN for plan in plans]),
            torch.cat([plan.mask_BK for plan in plans]),
            torch.cat(indices) if len(indices) == len(plans) else None,
            torch.cat([plan.matrix() for plan in plans]) if mixed else None,
        )

    def cut(self, text: int, lengths: tuple[int, int]) -> Plan:
        """The plan with fewer slots at the end of the text, its first `text` slots, and of the
        image.

        `lengths` is how many of each stay; the others must be empty.
        """
        # The slots that stay; those of the image move forward.
        numbers = torch.arange(self.slots, device=self.mask_BK.device)
        kept = torch.cat([numbers[: lengths[0]], numbers[text : text + lengths[1]]])
        slot_BN = torch.where(
            self.slot_BN >= text, self.slot_BN - (text - lengths[0]), self.slot_BN
        )
        index_BK = None if self.index_BK is None else self.index_BK[:, kept]
        shares_BKN = None if self.shares_BKN is None else self.shares_BKN[:, kept]
        return Plan(slot_BN, self.weight_BN, self.mask_BK[:, kept], index_BK, shares_BKN)

    def then(self, later: Plan) -> Plan:
        """This plan, followed by another plan for its slots."""
        slot = self.slot_BN.clamp_min(0)
        kept = self.slot_BN >= 0
        index = None
        if self.index_BK is not None and later.index_BK is not None:
            index = self.index_BK.gather(1, later.index_BK)
        mixed = self.shares_BKN is not None or later.shares_BKN is not None
        return Plan(
            torch.where(kept, later.slot_BN.gather(1, slot), DROPPED),
            self.weight_BN * later.weight_BN.gather(1, slot),
            later.mask_BK,
            index,
            later.reduce(self.matrix()) if mixed else None,
        )

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plan as a matrix [B,K,N] of weights: `reduce` is the product with it."""
        return self._rows(slice(0, self.slots), dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The rows of the matrix for these slots."""
        if self.shares_BKN is not None:
            return self.shares_BKN[:, rows].to(dtype)
        # Sources of other slots, and dropped ones, write into an extra row, which is cut off.
        batch, count = self.slot_BN.shape
        height = rows.stop - rows.start
        inside = (self.slot_BN >= rows.start) & (self.slot_BN < rows.stop)
        target = torch.where(inside, self.slot_BN - rows.start, height)
        matrix = torch.zeros(batch, height + 1, count, device=self.slot_BN.device, dtype=dtype)
        return matrix.scatter(1, target[:, None], self.weight_BN[:, None].to(dtype))[:, :-1]

    def reduce(self, x_BND: Tensor) -> Tensor:
        """Shorten a tensor [B,N] or [B,N,D]: gather, or the weighted sum of each slot's members.

        A matrix product instead of scatter_reduce: exportable, deterministic and fast in half
        precision. On CPUs in float32, summing in place is as exact and ten times as fast. The
        matrix is built in blocks of rows no larger than the tensor, or 4 MiB.

        Values never reach another sample; those of dropped tokens and padding reach nothing. A NaN
        or inf in a kept token stays in its slot where tokens are gathered or summed in place; the
        matrix product spreads it over the sample, because 0 * NaN is NaN.
        """
        if self.index_BK is not None:
            return tokens_at(x_BND, self.index_BK)
        on_cpu = x_BND.device.type == "cpu" and x_BND.dtype == torch.float32
        if self.shares_BKN is None and on_cpu and not torch.compiler.is_compiling():
            return self._add_up(x_BND)
        # Tokens of no slot may be NaN, and 0 * NaN is NaN.
        columns_BND = x_BND if x_BND.ndim == 3 else x_BND[..., None]
        columns_BND = columns_BND.masked_fill(~self._enters()[..., None], 0)
        batch, count, width = columns_BND.shape
        blocks = row_blocks(self.slots, batch * count, width)
        parts = [self._rows(rows, x_BND.dtype) @ columns_BND for rows in blocks]
        total_BKD = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return total_BKD if x_BND.ndim == 3 else total_BKD[..., 0]

    def _enters(self) -> Tensor:
        """Which sources enter a slot in use, bool [B,N]."""
        if self.shares_BKN is not None:
            return ((self.shares_BKN != 0) & (self.mask_BK[..., None] > 0)).any(1)
        if (
            self.mask_BK.dtype != torch.bool or not self.slots
        ):  # the published code counts what is masked
            return self.slot_BN >= 0
        return (self.slot_BN >= 0) & self.mask_BK.gather(1, self.slot_BN.clamp_min(0))

    def _add_up(self, x_BND: Tensor) -> Tensor:
        # All samples as one list of slots, each with an extra one for dropped tokens.
        batch, slots = self.mask_BK.shape
        target = torch.where(self.slot_BN < 0, slots, self.slot_BN)
        rows = torch.arange(batch, device=target.device)[:, None] * (slots + 1)
        weight = self.weight_BN if x_BND.ndim == 2 else self.weight_BN[..., None]
        total = x_BND.new_zeros(batch * (slots + 1), *x_BND.shape[2:])
        total = total.index_add_(0, (target + rows).flatten(), (x_BND * weight).flatten(0, 1))
        return total.view(batch, slots + 1, *x_BND.shape[2:])[:, :slots]

    def expand(self, y_BKD: Tensor) -> Tensor:
        """Expand [B,K] or [B,K,D] to the sources: each gets the value of its slot, dropped ones get
        zeros."""
        dropped = self.slot_BN < 0
        values = tokens_at(y_BKD, self.slot_BN.clamp_min(0))
        return values.masked_fill(dropped[..., None] if y_BKD.ndim == 3 else dropped, 0)

    def total(self, sizes_BN: Tensor) -> Tensor:
        """Sizes of the slots [B,K]: the sums of the sizes of their members."""
        target = torch.where(self.slot_BN < 0, self.slots, self.slot_BN)
        total = torch.zeros(
            target.shape[0], self.slots + 1, device=target.device, dtype=sizes_BN.dtype
        )
        return total.scatter_add(1, target, sizes_BN)[:, :-1]

    def sources(self) -> Tensor:
        """Which source tokens are in which slot, bool [B,K,N]."""
        numbers = torch.arange(self.slots, device=self.slot_BN.device)
        return self.slot_BN[:, None] == numbers[None, :, None]


def tokens_at(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens at these indices, of a tensor [B,N] or [B,N,D].

    One index_select over all samples copies whole rows; `gather` takes six times as long on a CPU.
    """
    batch, count = x_BND.shape[:2]
    first_B1 = count * torch.arange(batch, device=x_BND.device)[:, None]
    gathered = x_BND.flatten(0, 1).index_select(0, (index_BK + first_B1).flatten())
    return gathered.view(*index_BK.shape, *x_BND.shape[2:])


def _block_diagonal(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [B,K,N] along the diagonal of a larger one, zero elsewhere."""
    count, before, rows = sum(part.shape[2] for part in parts), 0, []
    for part in parts:
        after = count - before - part.shape[2]
        rows.append(torch.nn.functional.pad(part, (before, after)))
        before += part.shape[2]
    return torch.cat(rows, 1)


def _ones(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.ones(shape, device=device, dtype=torch.float32)
