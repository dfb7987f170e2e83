"""Reduction inside the blocks of an encoder whose token axis is text, image, or both.

Shape suffixes: B batch, N tokens of the layer, Q those of an attention's queries, K those of its
keys, S source tokens (unreduced), D channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.encoder.packing import Counts, Packing, count
from pumer.adapters.forward import max_length, no_autocast, timed
from pumer.adapters.step import ReductionStep
from pumer.reducers import EMBEDDINGS, Learned, Plan, Tokens

ALL = slice(0, None)
"""All columns of the token axis."""
BUCKET = 8
"""Lengths that depend on the data are rounded up to multiples of this."""


@dataclass(frozen=True)
class EncoderLayout:
    """The token axis between two layers; immutable, each layer returns a new one.

    Args:
        text: text tokens, padding included.
        mask_BN: attention mask (bool; float in the official mode).
        sizes_BN: source tokens that each token stands for.
        plan: from the source tokens to these; None before the first reduction.
        grid: rows and columns of patches of the unreduced image, None if unknown.
        patch_BS: raster index of every source token's patch, -1 for tokens that are no patch.
        carried_BN: what the reducer wants to see again of every token; None without such.
        entered_BI: mask of the image tokens but [CLS] that entered the first reducing layer.
        gate_BN: in the training of a learned reducer, 1 for tokens that it keeps so far; None
            before its first decision.
        keep_ratios, heads: its decisions so far, for the budget loss.
        num_prefix_tokens: structure tokens at the head of each modality.
        padded: whether some tokens may be padding although nothing was reduced.
        packing: of the states, whose rows then lie end to end; None where they are padded, as all
            else here always is.
    """

    text: int
    mask_BN: Tensor
    sizes_BN: Tensor
    plan: Plan | None = None
    grid: tuple[int, int] | None = None
    patch_BS: Tensor | None = None
    carried_BN: Tensor | None = None
    entered_BI: Tensor | None = None
    gate_BN: Tensor | None = None
    keep_ratios: tuple[Tensor, ...] = ()
    heads: tuple[Tensor, ...] = ()
    num_prefix_tokens: int = 1
    padded: bool = False
    packing: Packing | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """(text, image) tokens."""
        return self.text, self.mask_BN.shape[1] - self.text

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(text, image) tokens of every row; padding counts where states are padded."""
        if self.packing is None:
            return (self.lengths,) * len(self.mask_BN)
        return self.packing.counts.lengths

    @property
    def border(self) -> int:
        """Where the image starts in states of text and image side by side."""
        return self.text if self.packing is None else self.packing.border

    def pad(self, states: Tensor, columns: slice = ALL) -> Tensor:
        """States of these columns with padding, [B,N,D]."""
        return states if self.packing is None else self.packing.at(columns).pad(states)

    def pack(self, states_BND: Tensor, columns: slice = ALL) -> Tensor:
        """Padded states of these columns as this layout has them."""
        return states_BND if self.packing is None else self.packing.at(columns).pack(states_BND)

    def stream(self, states: Tensor, columns: slice) -> Tensor:
        """The text or the image, out of states whose rows have both."""
        if self.packing is None:
            return states[:, columns]
        return self.packing.stream(states, columns)

    def expand(self, states_BND: Tensor) -> Tensor:
        """States in the original length; zeros for dropped tokens, and for packed padding."""
        states_BND = self.pad(states_BND)
        return states_BND if self.plan is None else self.plan.expand(states_BND)

    def to(self, device: torch.device, non_blocking: bool = False) -> EncoderLayout:
        """The layout on another device; hooks that move a layer's inputs to its weights call
        this."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
        keep_ratios, heads = (
            tuple(x.to(device) for x in charged) for charged in (self.keep_ratios, self.heads)
        )
        return replace(self, **moved, keep_ratios=keep_ratios, heads=heads)

    def places(self, trimmed: int, text: int) -> Tensor:
        """The position of every token in the input, int64 [B,N]; -1 for padding and empty slots.

        Text comes first, then [CLS], where there is one, and the patches in raster order. A merged
        token has the
        position of its first member.

        Args:
            trimmed: text tokens before the first reduction.
            text: text tokens of the input, trimmed padding included.
        """
        first_BN = first_sources(Plan.identity(self.mask_BN) if self.plan is None else self.plan)
        if self.patch_BS is None:
            place_BN = torch.where(first_BN < trimmed, first_BN, first_BN + (text - trimmed))
        else:
            patch_BN = self.patch_BS.gather(1, first_BN.clamp_max(self.patch_BS.shape[1] - 1))
            place_BN = torch.where(
                first_BN < trimmed, first_BN, text + self.num_prefix_tokens + patch_BN
            )
        return place_BN.masked_fill(~(self.mask_BN > 0), -1)


def first_sources(plan: Plan) -> Tensor:
    """The first source token of every slot [B,K]; undefined for empty slots."""
    if plan.index_BK is not None:
        return plan.index_BK
    count = plan.slot_BN.shape[1]
    positions_BN = torch.arange(count, device=plan.slot_BN.device).expand(plan.slot_BN.shape)
    # Dropped tokens write into an extra slot, which is cut off.
    slot_BN = torch.where(plan.slot_BN < 0, plan.slots, plan.slot_BN)
    first_BK = slot_BN.new_full((len(slot_BN), plan.slots + 1), count)
    return first_BK.scatter_reduce(1, slot_BN, positions_BN, "amin")[:, :-1]


@timed("encoder")
def reduce(
    patch: Patch,
    layer: int,
    states_BND: Tensor,
    layout: EncoderLayout,
    queries_BHNC: Tensor | None = None,
    keys_BHNC: Tensor | None = None,
    attention_BHNN: Tensor | None = None,
    cross: bool = False,
) -> tuple[Tensor, EncoderLayout, Plan | None]:
    """States and layout after the reducer acted in this layer, and its plan, None without a
    reduction.

    In the training of a learned reducer no token leaves: the layout records its decisions.
    Arguments as for `choose`.
    """
    reducer = patch.reducer
    if patch.bypassed or not reducer.reduces_at(layer):
        return states_BND, layout, None
    padded_BND = states_BND
    if layout.packing is not None:
        padded_BND = layout.pad(states_BND)
        needs_qk = reducer.traits.needs_qk
        queries_BHNC, keys_BHNC = (
            None if x is None or not needs_qk else layout.packing.at(columns).pad_heads(x)
            for x, columns in (
                (queries_BHNC, slice(0, layout.text) if cross else ALL),
                (keys_BHNC, ALL),
            )
        )
    layout, plan, counts = choose(
        patch, layer, padded_BND, layout, queries_BHNC, keys_BHNC, attention_BHNN, cross
    )
    if plan is None:
        return states_BND, layout, None
    states_BND = plan.reduce(padded_BND)
    return *(pack(patch, states_BND, layout, counts) if counts else (states_BND, layout)), plan


def choose(
    patch: Patch,
    layer: int,
    states_BND: Tensor,
    layout: EncoderLayout,
    queries_BHNC: Tensor | None = None,
    keys_BHNC: Tensor | None = None,
    attention_BHNN: Tensor | None = None,
    cross: bool = False,
    tower: bool = False,
) -> tuple[EncoderLayout, Plan | None, Counts | None]:
    """The layout after the reducer acted in this layer, its plan, None without a reduction, and
    the counts of its mask if the model packs.

    Args:
        patch: of the model.
        layer: index of the layer.
        states_BND: before the reduction.
        layout: of those states.
        queries_BHNC, keys_BHNC, attention_BHNN, cross: as in `Tokens`.
        tower: whether the vision tower's reducer acts.
    """
    reducer = patch.traits.vision_reducer if tower else patch.reducer
    assert reducer is not None
    if patch.bypassed or not reducer.reduces_at(layer):
        return layout, None, None
    traits, unreduced = reducer.traits, layout.plan is None
    # What the reducer sees. The grid of patches is complete only before the first reduction.
    tokens = Tokens(
        mask_BN=layout.mask_BN,
        text=layout.text,
        sizes_BN=layout.sizes_BN,
        layer=layer,
        num_prefix_tokens=layout.num_prefix_tokens,
        grid=layout.grid if unreduced else None,
        patch_BN=layout.patch_BS if unreduced else None,
        carried_BN=layout.carried_BN,
        states_BND=states_BND,
        queries_BHNC=queries_BHNC,
        keys_BHNC=keys_BHNC,
        attention_BHNN=attention_BHNN,
        cross=cross,
        entered_BI=layout.entered_BI,
        part=patch.part(layer) if traits.learned else None,
        gate_BN=layout.gate_BN,
        progress=patch.progress,
    )
    # In training a learned reducer only records its decisions.
    learned: Learned | None = traits.learned
    if learned is not None and tokens.part is not None and tokens.part.training:
        decision = learned.gate(tokens)
        keep_ratios = (*layout.keep_ratios, decision.keep_ratio)
        return replace(layout, gate_BN=decision.token_BN, keep_ratios=keep_ratios), None, None
    # The choice of tokens is not differentiated; gradients flow through the tokens that are kept.
    with torch.no_grad(), no_autocast(reducer, states_BND.device):
        plan = reducer.plan(tokens)
        carried_BN = layout.carried_BN if plan.carried_BN is None else plan.carried_BN
        text, _ = reducer.lengths(tokens.shape)
        counts = count(plan.mask_BK, text) if patch.pack and not tower else None
        if traits.dynamic_length and patch.trim and not torch.compiler.is_compiling():
            lengths = _used(plan.mask_BK, text) if counts is None else counts.used
            plan, text = plan.cut(text, lengths), lengths[0]
    if patch.steps is not None and not tower:
        patch.steps.append(ReductionStep(layer, layout.text, plan, layout.grid, layout.patch_BS))
    # The layout of the tokens that are left.
    entered_BI = layout.entered_BI
    if entered_BI is None and layer != EMBEDDINGS:
        entered_BI = tokens.valid_BN[:, layout.text + tokens.num_prefix_tokens :]
    reduced = replace(
        layout,
        text=text,
        mask_BN=plan.mask_BK,
        sizes_BN=plan.total(layout.sizes_BN),
        plan=plan if layout.plan is None else layout.plan.then(plan),
        carried_BN=None if carried_BN is None else plan.total(carried_BN),
        entered_BI=entered_BI,
        packing=None,
    )
    return reduced, plan, counts


def pack(
    patch: Patch, states_BND: Tensor, layout: EncoderLayout, counts: Counts | None = None
) -> tuple[Tensor, EncoderLayout]:
    """States with the rows end to end, and their layout, if the model packs and a row has padding.

    Args:
        patch: of the model.
        states_BND: of text and image.
        layout: of those states.
        counts: of the layout's mask, if they are known.
    """
    if not patch.pack or layout.packing is not None:
        return states_BND, layout
    if torch.compiler.is_compiling():
        raise ValueError(
            "packed rows have no length that torch.compile could know: call "
            "pumer.apply(model, reducer) without pack=True"
        )
    packing = Packing.of(
        layout.mask_BN,
        layout.text,
        count(layout.mask_BN, layout.text) if counts is None else counts,
        patch.adapter.has_cross_attention,
    )
    layout = replace(layout, packing=packing)
    return layout.pack(states_BND), layout


def unpack(states: Tensor, layout: EncoderLayout) -> tuple[Tensor, EncoderLayout]:
    """States of text and image with padding, and their layout."""
    return layout.pad(states), replace(layout, packing=None)


def _used(mask_BK: Tensor, text: int) -> tuple[int, int]:
    """How many slots of the text (the first `text` slots) and of the image are in use, rounded up
    to buckets.

    The only host-device sync inside the layers, and only for reducers with a dynamic length.
    """
    slots = mask_BK.shape[1]
    lengths = torch.stack(
        [
            max_length(mask_BK[:, :text]) if text else mask_BK.new_zeros((), dtype=torch.int64),
            max_length(mask_BK[:, text:]),
        ]
    ).tolist()
    limits = (text, slots - text)
    bucketed = [
        min(-(-length // BUCKET) * BUCKET, limit)
        for length, limit in zip(lengths, limits, strict=True)
    ]
    return bucketed[0], bucketed[1]


def head_mask(
    patch: Patch,
    layer: int,
    name: str,
    layout: EncoderLayout,
    queries_BQD: Tensor,
    keys_BKD: Tensor,
    queries_at: slice,
    keys_at: slice,
) -> tuple[Tensor | None, EncoderLayout]:
    """A learned reducer's head-pruning mask of an attention, [B,H], 1 for heads that are kept; None
    if it prunes no heads here.

    Args:
        patch: of the model.
        layer: index of the layer.
        name: of the attention, as in the reducer's parts.
        layout: in training it records the share of heads that are kept.
        queries_BQD, keys_BKD: states that queries and keys are computed from.
        queries_at, keys_at: where these are on the token axis.
    """
    learned: Learned | None = patch.traits.learned
    if patch.bypassed or learned is None or not (learned.trims_heads and learned.reduces_at(layer)):
        return None, layout
    weight_BN = layout.mask_BN.float() if layout.gate_BN is None else layout.gate_BN
    part = patch.part(layer)
    pooled = []
    for states, columns in ((queries_BQD, queries_at), (keys_BKD, keys_at)):
        weights = layout.pack(weight_BN[:, columns, None].to(states.dtype), columns)
        totals = (states * weights, weights)
        if layout.packing is None:
            total_BD, weight_B1 = (x.sum(1) for x in totals)
        else:
            total_BD, weight_B1 = (layout.packing.at(columns).sums(x) for x in totals)
        pooled.append(total_BD / weight_B1.clamp_min(1))
    mask_BH = part[name](*pooled, learned.sampling_at(patch.progress) if part.training else None)
    return mask_BH, replace(
        layout, heads=(*layout.heads, mask_BH.mean(1))
    ) if part.training else layout
