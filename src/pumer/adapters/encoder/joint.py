"""What joint encoders share: the inputs of the text, the joint token axis, and its attention.

Shape suffixes: B batch, T text tokens, I image tokens, N = T + I, H heads, Q queries, K keys, C
channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder.clip import Encoded
from pumer.adapters.encoder.packing import Packing
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import exactly_one
from pumer.adapters.step import ReductionStep
from pumer.reducers import EMBEDDINGS, Plan

BY_ROW = ("cpu",)
"""Devices on which packed rows attend one after the other: faster there than masked attention over
padding, than nested tensors and than a block mask."""


@dataclass(frozen=True)
class TextInputs:
    """The inputs of a text encoder, in the order of METER's `encode_text`."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids [B,T] or embeddings [B,T,D]; raises ValueError unless exactly one of them is
        given."""
        return exactly_one(input_ids=self.input_ids, inputs_embeds=self.inputs_embeds)

    @property
    def embedded(self) -> dict[str, Tensor | None]:
        """The keyword arguments of transformers' text embeddings."""
        return {name: x for name, x in vars(self).items() if name != "attention_mask"}

    @property
    def mask(self) -> Tensor:
        """The attention mask [B,T], ones where none is given; raises ValueError for one of another
        shape."""
        mask, tokens = self.attention_mask, self.tokens
        if mask is None:
            return torch.ones(tokens.shape[:2], device=tokens.device, dtype=torch.long)
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask is {list(mask.shape)} for texts of {list(tokens.shape[:2])}: "
                "give it one entry per token"
            )
        return mask

    def trimmed(self, length: int) -> TextInputs:
        """The first tokens of every text."""
        return replace(
            self, **{name: x[:, :length] for name, x in vars(self).items() if x is not None}
        )


def joint_layout(
    patch: Patch,
    mask_BT: Tensor,
    mask_BI: Tensor,
    grid: tuple[int, int] | None,
    patch_BS: Tensor | None,
    sizes_BI: Tensor | None = None,
    plan: Plan | None = None,
) -> EncoderLayout:
    """The token axis before the first layer, text first.

    Args:
        patch: whose reducer says which kind of mask it works with.
        mask_BT: of the text.
        mask_BI: bool, of the image.
        grid: rows and columns of patches.
        patch_BS: raster number of every source token's patch, -1 for tokens that are none.
        sizes_BI: patches that each image token stands for; None if one each.
        plan: from the source tokens to these, where the vision tower has reduced them.
    """
    mask_BN = torch.cat([mask_BT.bool(), mask_BI], dim=1)
    sizes_BN = torch.ones_like(mask_BN, dtype=torch.float32)
    if sizes_BI is not None:
        sizes_BN = torch.cat([sizes_BN[:, : mask_BT.shape[1]], sizes_BI], dim=1)
    if patch.traits.official:  # the published code works with fractional masks
        mask_BN = torch.cat([mask_BT.float(), mask_BI.float()], dim=1)
    return EncoderLayout(mask_BT.shape[1], mask_BN, sizes_BN, plan, grid, patch_BS)


def entry_layout(patch: Patch, mask_BT: Tensor, image: Encoded) -> EncoderLayout:
    """The layout before the first layer of two streams, with the tower's reduction of the image."""
    batch, text = mask_BT.shape
    states, plan = image.states_BID, None
    if image.plan is None:
        real_BI = torch.ones(batch, states.shape[1], device=states.device, dtype=torch.bool)
        count = states.shape[1]
    else:
        real_BI, count = image.plan.mask_BK, image.plan.slot_BN.shape[1]
        plan = Plan.side_by_side([Plan.identity(mask_BT.bool()), image.plan])
    # Patches follow [CLS] in raster order.
    position_S = torch.arange(count, device=states.device) - 1
    patch_BS = torch.nn.functional.pad(position_S, (text, 0), value=-1).expand(batch, -1)
    if plan is not None and patch.steps is not None:
        patch.steps.append(ReductionStep(EMBEDDINGS, text, plan, image.grid, patch_BS))
    return joint_layout(patch, mask_BT, real_BI, image.grid, patch_BS, image.sizes_BI, plan)


def unpack(
    layout: EncoderLayout, text: Tensor, image: Tensor
) -> tuple[Tensor, Tensor, EncoderLayout]:
    """Text and image states with padding, and their layout."""
    text = layout.pad(text, slice(0, layout.text))
    image = layout.pad(image, slice(layout.text, None))
    return text, image, replace(layout, packing=None)


def expand(
    layout: EncoderLayout, text_length: int, text: Tensor, image: Tensor
) -> tuple[Tensor, Tensor]:
    """Text and image states in their original lengths; dropped tokens are zeros."""
    text, image, layout = unpack(layout, text, image)
    if layout.plan is None:
        return text, image
    states = layout.expand(torch.cat([text, image], dim=1))
    return states[:, :text_length], states[:, text_length:]


def split(states_BND: Tensor, layout: EncoderLayout) -> tuple[Tensor, Tensor]:
    """Text and image of the joint axis, each contiguous: of anything else every linear layer makes
    a copy, and adds its bias in a pass of its own."""
    text, image = states_BND[:, : layout.border], states_BND[:, layout.border :]
    return text.contiguous(), image.contiguous()


def attend(
    patch: Patch,
    layout: EncoderLayout,
    queries_BHQC: Tensor,
    keys_BHKC: Tensor,
    values_BHKC: Tensor,
    queries_at: slice,
    keys_at: slice,
    *,
    dtype: torch.dtype,
    is_self_attention: bool,
    padded: bool = True,
    dropout: float = 0.0,
    probabilities: bool = False,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the reducer asks for it -> context [B,Q,H*C], and the probabilities [B,H,Q,K]
    where they were computed.

    Args:
        patch: whose reducer is active.
        layout: the token axis.
        queries_BHQC, keys_BHKC, values_BHKC: of this attention.
        queries_at, keys_at: where these are on the axis.
        dtype: of the states.
        is_self_attention: whether the keys are the queries' own tokens.
        padded: whether there may be padding among the keys although nothing was reduced.
        dropout: of the probabilities.
        probabilities: whether to compute them, even if the reducer does not need them.
        head_mask: 1 or 0 for every head, [B,H]; None for all heads.
    """
    if layout.packing is not None:
        return _attend_packed(
            patch,
            layout,
            layout.packing,
            queries_BHQC,
            keys_BHKC,
            values_BHKC,
            queries_at,
            keys_at,
            dtype=dtype,
            is_self_attention=is_self_attention,
            padded=padded,
            dropout=dropout,
            probabilities=probabilities,
            head_mask=head_mask,
        )
    traits, mask = patch.traits, layout.mask_BN[:, keys_at]
    attention: Tensor | None
    if layout.gate_BN is not None:
        context, attention = kernels.attend_gated(
            queries_BHQC,
            keys_BHKC,
            values_BHKC,
            mask,
            layout.gate_BN[:, keys_at],
            is_self_attention,
            dropout,
        )
    elif traits.official:
        context, attention = kernels.attend_official(
            queries_BHQC, keys_BHKC, values_BHKC, mask, dropout
        )
    else:
        sizes, bias = _key_sizes(patch, layout, keys_at), None
        if padded or sizes is not None or traits.dynamic_length:
            bias = kernels.attention_bias(mask, sizes, dtype)
        context, attention = kernels.attend(
            queries_BHQC,
            keys_BHKC,
            values_BHKC,
            bias,
            patch.attention,
            dropout,
            probabilities or traits.needs_attention,
        )
    if head_mask is not None:
        context = context * head_mask[..., None, None].to(context.dtype)
    return context.transpose(1, 2).flatten(2), attention


def _attend_packed(
    patch: Patch,
    layout: EncoderLayout,
    packing: Packing,
    queries_1HPC: Tensor,
    keys_1HPC: Tensor,
    values_1HPC: Tensor,
    queries_at: slice,
    keys_at: slice,
    *,
    dropout: float,
    head_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend` for packed rows -> context [1,P,H*C], and probabilities [B,H,Q,K] where computed.

    Where rows cannot attend one after the other, padding is put back for the attention alone.
    """
    queries, keys = packing.at(queries_at), packing.at(keys_at)
    by_row = layout.gate_BN is None and queries_1HPC.device.type in BY_ROW
    if not by_row or settings["probabilities"] or patch.traits.needs_attention:
        context, attention = attend(
            patch,
            replace(layout, packing=None),
            queries.pad_heads(queries_1HPC),
            keys.pad_heads(keys_1HPC),
            keys.pad_heads(values_1HPC),
            queries_at,
            keys_at,
            dropout=dropout,
            head_mask=head_mask,
            **settings,
        )
        return queries.pack(context), attention
    sizes, bias = _key_sizes(patch, layout, keys_at), None
    if sizes is not None or packing.counts.hidden:
        bias = kernels.attention_bias(
            keys.pack(layout.mask_BN[:, keys_at]),
            None if sizes is None else keys.pack(sizes),
            settings["dtype"],
        )
    context = kernels.attend_rows(
        queries_1HPC,
        keys_1HPC,
        values_1HPC,
        bias,
        queries.lengths,
        keys.lengths,
        patch.attention,
        dropout,
    )
    if head_mask is not None:
        heads_PH1 = head_mask[queries.row_P][..., None].to(context.dtype)
        context = (context.unflatten(-1, (head_mask.shape[1], -1)) * heads_PH1).flatten(-2)
    return context, None


def _key_sizes(patch: Patch, layout: EncoderLayout, keys_at: slice) -> Tensor | None:
    """Sizes of the keys [B,K], where attention counts a token by its size for the reducer here or
    that in the tower; else None."""
    traits, tower = patch.traits, patch.traits.vision_reducer
    counts = traits.proportional_attention or (
        tower is not None and tower.traits.proportional_attention
    )
    return layout.sizes_BN[:, keys_at] if counts and layout.plan is not None else None
