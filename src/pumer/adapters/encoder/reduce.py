"""Seam A: reduction inside the blocks of an encoder that carries text, image, or both on one token
axis.

Shape suffixes: B batch, N tokens of the layer, A, E some of them, S source tokens (unreduced), D
channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pumer.adapters.base import Patch, Step, exact, extent, timed
from pumer.reducers import EMBEDDINGS, Plan, Tokens

BUCKET = 8
"""Where the data decide how many tokens stay, lengths are rounded up to multiples of this."""


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
        entered_BI: mask of the image tokens but [CLS] that entered the first layer that reduces.
        gate_BN: while a learned reducer is trained, 1 for tokens that it has not decided against;
            None before it does.
        spent, heads: what its decisions are charged for.
    """

    text: int
    mask_BN: Tensor
    sizes_BN: Tensor
    plan: Plan | None = None
    grid: tuple[int, int] | None = None
    patch_BS: Tensor | None = None
    entered_BI: Tensor | None = None
    gate_BN: Tensor | None = None
    spent: tuple[Tensor, ...] = ()
    heads: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """(text, image) tokens."""
        return self.text, self.mask_BN.shape[1] - self.text

    def expand(self, states_BND: Tensor) -> Tensor:
        """States in the original length; dropped tokens are zeros."""
        return states_BND if self.plan is None else self.plan.expand(states_BND)

    def to(self, device: torch.device, non_blocking: bool = False) -> Axis:
        """The axis on another device; hooks that move a layer's inputs to its weights call this."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
        spent, heads = (
            tuple(x.to(device) for x in charged) for charged in (self.spent, self.heads)
        )
        return replace(self, **moved, spent=spent, heads=heads)

    def places(self, trimmed: int, text: int) -> Tensor:
        """Where every token stood in the input, int64 [B,N]; -1 for padding and empty slots.

        Text comes first, then [CLS] and the patches in raster order. A merged token is where its
        first member stood.

        Args:
            trimmed: text tokens before anything was reduced.
            text: text tokens of the input, those of padding that were trimmed off included.
        """
        first_BN = _first_sources(Plan.identity(self.mask_BN) if self.plan is None else self.plan)
        if self.patch_BS is None:
            place_BN = torch.where(first_BN < trimmed, first_BN, first_BN + (text - trimmed))
        else:
            patch_BN = self.patch_BS.gather(1, first_BN.clamp_max(self.patch_BS.shape[1] - 1))
            place_BN = torch.where(first_BN < trimmed, first_BN, text + 1 + patch_BN)
        return place_BN.masked_fill(~(self.mask_BN > 0), -1)


def _first_sources(plan: Plan) -> Tensor:
    """The first source token of every slot [B,K]; any number for empty slots."""
    if plan.index_BK is not None:
        return plan.index_BK
    count = plan.slot_BN.shape[1]
    positions_BN = torch.arange(count, device=plan.slot_BN.device).expand(plan.slot_BN.shape)
    # Dropped tokens write into one slot past the end, which is cut off again.
    slot_BN = torch.where(plan.slot_BN < 0, plan.slots, plan.slot_BN)
    first_BK = slot_BN.new_full((len(slot_BN), plan.slots + 1), count)
    return first_BK.scatter_reduce(1, slot_BN, positions_BN, "amin")[:, :-1]


def check_mask(attention_mask: Tensor | None, text: Tensor) -> Tensor:
    """The mask of a text, [B,T] or [B,T,D]: ones if there is none; raises ValueError for one of
    another shape."""
    if attention_mask is None:
        return torch.ones(text.shape[:2], device=text.device, dtype=torch.long)
    if attention_mask.shape != text.shape[:2]:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} for texts of {list(text.shape[:2])}: "
            "give it one entry per token"
        )
    return attention_mask


@timed("encoder")
def reduce(
    patch: Patch,
    layer: int,
    states_BND: Tensor,
    axis: Axis,
    queries_BHNC: Tensor | None = None,
    keys_BHNC: Tensor | None = None,
    attention_BHNN: Tensor | None = None,
    cross: bool = False,
    tower: bool = False,
) -> tuple[Tensor, Axis, Plan | None]:
    """States and axis after the reducer acted in this layer, and its plan; None if no token went
    anywhere.

    While a learned reducer is trained, its decisions are noted in the axis instead.

    Args:
        patch: whose reducer acts.
        layer: where.
        states_BND: before it does.
        axis: of those states.
        queries_BHNC, keys_BHNC, attention_BHNN, cross: as in `Tokens`.
        tower: whether it is the reducer of the vision tower that acts.
    """
    reducer = patch.reducer.in_tower if tower else patch.reducer
    assert reducer is not None
    if patch.whole or not reducer.reduces_at(layer):
        return states_BND, axis, None
    unreduced = axis.plan is None
    tokens = Tokens(
        mask_BN=axis.mask_BN,
        text=axis.text,
        sizes_BN=axis.sizes_BN,
        layer=layer,
        grid=axis.grid if unreduced else None,
        patch_BN=axis.patch_BS if unreduced else None,
        states_BND=states_BND,
        queries_BHNC=queries_BHNC,
        keys_BHNC=keys_BHNC,
        attention_BHNN=attention_BHNN,
        cross=cross,
        entered_BI=axis.entered_BI,
        part=patch.part(layer) if reducer.learned else None,
        gate_BN=axis.gate_BN,
        progress=patch.progress,
    )
    if reducer.learned and tokens.part is not None and tokens.part.training:
        gate = reducer.learned.gate(tokens)
        return (
            states_BND,
            replace(axis, gate_BN=gate.token_BN, spent=(*axis.spent, gate.spent)),
            None,
        )
    # Which tokens go is a choice, not a function to differentiate; the gradient flows through what
    # is kept.
    with torch.no_grad(), exact(reducer, states_BND.device):
        plan = reducer.plan(tokens)
        text, _ = reducer.lengths(*axis.lengths, layer, grid=tokens.grid)
        if reducer.leaves_gaps and patch.trim and not torch.compiler.is_compiling():
            lengths = _used(plan.mask_BK, text)
            plan, text = plan.cut(text, lengths), lengths[0]
    if patch.steps is not None and not tower:
        patch.steps.append(Step(layer, axis.text, plan, axis.grid, axis.patch_BS))
    entered_BI = axis.entered_BI
    if entered_BI is None and layer != EMBEDDINGS:
        entered_BI = tokens.valid_BN[:, axis.text + tokens.prefix :]
    reduced = replace(
        axis,
        text=text,
        mask_BN=plan.mask_BK,
        sizes_BN=plan.total(axis.sizes_BN),
        plan=plan if axis.plan is None else axis.plan.then(plan),
        entered_BI=entered_BI,
    )
    return plan.reduce(states_BND), reduced, plan


def _used(mask_BK: Tensor, text: int) -> tuple[int, int]:
    """Slots of the text, the first `text` ones, and of the image up to the last that is filled, in
    whole buckets.

    The one place in the layers where the host reads anything, for reducers alone that leave it to
    the data.
    """
    slots = mask_BK.shape[1]
    lengths = torch.stack(
        [
            extent(mask_BK[:, :text]) if text else mask_BK.new_zeros((), dtype=torch.int64),
            extent(mask_BK[:, text:]),
        ]
    ).tolist()
    limits = (text, slots - text)
    bucketed = [
        min(-(-length // BUCKET) * BUCKET, limit)
        for length, limit in zip(lengths, limits, strict=True)
    ]
    return bucketed[0], bucketed[1]


def hear(
    patch: Patch,
    layer: int,
    name: str,
    axis: Axis,
    asking_BAD: Tensor,
    asked_BED: Tensor,
    asking: slice,
    asked: slice,
) -> tuple[Tensor | None, Axis]:
    """Which heads of an attention a learned reducer lets be heard, [B,H]: 1 or 0; None if it has no
    say.

    Args:
        patch: whose reducer decides.
        layer: where.
        name: of the attention, as the reducer's parts have it.
        axis: while training the share of heads is noted in it.
        asking_BAD, asked_BED: states of those who ask, and of those who are asked.
        asking, asked: where on the axis they are.
    """
    learned = patch.reducer.learned
    if patch.whole or learned is None or not (learned.trims_heads and learned.reduces_at(layer)):
        return None, axis
    seen_BN = axis.mask_BN.float() if axis.gate_BN is None else axis.gate_BN
    part = patch.part(layer)
    pooled = []
    for states, columns in ((asking_BAD, asking), (asked_BED, asked)):
        weights = seen_BN[:, columns, None].to(states.dtype)
        pooled.append((states * weights).sum(1) / weights.sum(1).clamp_min(1))
    heard_BH = part[name](*pooled, learned.draw_at(patch.progress) if part.training else None)
    return heard_BH, replace(axis, heads=(*axis.heads, heard_BH.mean(1))) if part.training else axis
