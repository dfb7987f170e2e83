"""Bipartite soft matching of similar tokens (ToMe, ICLR 2023, section 3.1).

Tokens at even positions are sources, which may be merged away; those at odd positions are
destinations, which they are merged into. As in the published code of ToMe, structure tokens in
front ([CLS], a distillation token) are neither, but count: after one [CLS] the sources are patches
1, 3, 5 ... (from 0).

Shape suffixes: B batch, N tokens, S sources, R some of these, E destinations, D key channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.ops.blocks import row_blocks
from pumer.reducers.ops.budget import halves, smaller
from pumer.reducers.plan import DROPPED, Plan


def rank(score_BN: Tensor) -> Tensor:
    """Rank of every element in its row, from high to low, ties by position: int64 [B,N]."""
    order = score_BN.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score_BN.shape[1], device=score_BN.device).expand(score_BN.shape)
    return torch.empty_like(order).scatter(1, order, places)


def rank_in_groups(score_BN: Tensor, group_BN: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Ranks in a row sorted by group (from 0), then from high to low: int64, both [B,N].

    Returns:
        The rank in the row, and the rank in the group.
    """
    # Sort by score, then stably by group.
    order = score_BN.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group_BN.gather(1, order).argsort(dim=1, stable=True))
    places = torch.arange(score_BN.shape[1], device=score_BN.device).expand(score_BN.shape)
    place_BN = torch.empty_like(order).scatter(1, order, places)
    # The rank in the group is that in the row, less the sizes of the groups before.
    size_BG = torch.zeros(len(score_BN), groups, dtype=torch.int64, device=score_BN.device)
    size_BG = size_BG.scatter_add(1, group_BN, torch.ones_like(group_BN))
    return place_BN, place_BN - (size_BG.cumsum(1) - size_BG).gather(1, group_BN)


UNALIKE = -2.0
"""Similarity of pairs with keys that are not finite: below every cosine, above padding."""


def split(count: int, num_prefix_tokens: int) -> tuple[slice, slice]:
    """Slices of sources and destinations of `count` tokens after `num_prefix_tokens` structure
    tokens."""
    first = num_prefix_tokens % 2
    return slice(first, count, 2), slice(1 - first, count, 2)


def unit_vectors(x_BND: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens normalized to length 1, without overflow or underflow of squares in float32.

    NaN for tokens with inf or NaN, zeros for zeros.
    """
    x_BND = x_BND.to(dtype)
    largest_BN1 = x_BND.abs().amax(-1, keepdim=True)
    scale_BN1 = torch.where((largest_BN1 > 1e15) | (largest_BN1 < 1e-15), largest_BN1, 1.0)
    scaled_BND = x_BND / scale_BN1.clamp_min(1e-38)
    return torch.nn.functional.normalize(scaled_BND, dim=-1, eps=1e-30)


def partners(
    keys_BND: Tensor, valid_BN: Tensor, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """The most similar destination of every source; needs at least one of each.

    Sources are compared in blocks, so that memory is linear in the tokens.

    Args:
        keys_BND: features for the cosine similarity.
        valid_BN: bool, false at padding, which has no partner and is none.
        num_prefix_tokens: structure tokens in front of these.

    Returns:
        similarity [B,S] (-inf without a partner), and the partner's index among the destinations
        [B,S].
    """
    # Unit vectors of sources [B,S,D] and destinations [B,E,D].
    sources, destinations = split(keys_BND.shape[1], num_prefix_tokens)
    unit_BND = unit_vectors(keys_BND)
    from_BSD, to_BED = unit_BND[:, sources], unit_BND[:, destinations]
    from_BS, to_BE = valid_BN[:, sources], valid_BN[:, destinations]
    batch, count, width = to_BED.shape
    blocks = row_blocks(from_BSD.shape[1], batch * count, width)
    nearest = [_nearest(from_BSD[:, rows], to_BED, from_BS[:, rows], to_BE) for rows in blocks]
    if len(nearest) == 1:
        return nearest[0]
    similarities, partner_indices = zip(*nearest, strict=True)
    return torch.cat(similarities, 1), torch.cat(partner_indices, 1)


def _nearest(
    from_BRD: Tensor,
    to_BED: Tensor,
    from_BR: Tensor,
    to_BE: Tensor,
) -> tuple[Tensor, Tensor]:
    """`partners` of some sources R, from unit vectors."""
    similarity_BRE = from_BRD @ to_BED.transpose(1, 2)
    # Keys that are not finite match last, because a fixed number of tokens has to go.
    similarity_BRE = torch.where(similarity_BRE.isfinite(), similarity_BRE, UNALIKE)
    pair_BRE = from_BR[..., None] & to_BE[:, None]
    return torch.where(pair_BRE, similarity_BRE, -torch.inf).max(dim=-1)


def bipartite(
    keys_BND: Tensor,
    valid_BN: Tensor,
    merged: int | Tensor,
    slots: int,
    sizes_BN: Tensor | None = None,
    num_prefix_tokens: int = 0,
    last_BN: Tensor | None = None,
) -> Plan:
    """Merge the `merged` sources with the highest similarity into their destinations.

    Tokens keep their order; a group takes the position of its destination. The number of merged
    tokens does not depend on the values.

    Args:
        keys_BND: features for the similarity.
        valid_BN: bool; real tokens come before padding, so that padding does not change the
            matching.
        merged: how many tokens to merge away, an int or int64 [B]; at most half of the real tokens.
        slots: number of slots: at least the real tokens minus the merged ones, in every row.
        sizes_BN: sizes of the tokens, the weights of the average; None if all are one.
        num_prefix_tokens: structure tokens in front, which count in the split.
        last_BN: bool, sources that are merged away only after all others.
    """
    if keys_BND.shape[1] < 2:
        return Plan.keep(valid_BN, slots)
    similarity_BS, partner_BS = partners(keys_BND, valid_BN, num_prefix_tokens)
    if last_BN is not None:
        # Below every other similarity, but above padding.
        sources, _ = split(keys_BND.shape[1], num_prefix_tokens)
        similarity_BS = torch.where(last_BN[:, sources], similarity_BS - 4, similarity_BS)
    limit_B1 = halves(valid_BN.sum(1, keepdim=True))
    limit_B1 = smaller(limit_B1, merged[:, None] if isinstance(merged, Tensor) else merged)
    return absorb(
        rank(similarity_BS) < limit_B1, partner_BS, valid_BN, slots, sizes_BN, num_prefix_tokens
    )


def absorb(
    merges_BS: Tensor,
    partner_BS: Tensor,
    valid_BN: Tensor,
    slots: int,
    sizes_BN: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Plan:
    """Merge the marked sources into their partners, all of them real tokens.

    Other arguments as in `bipartite`.
    """
    sources, destinations = split(valid_BN.shape[1], num_prefix_tokens)
    sizes_BN = torch.ones_like(valid_BN, dtype=torch.float32) if sizes_BN is None else sizes_BN
    # Tokens that stay get the slots in order; merged sources get the slot of their partner.
    gone_BN = torch.zeros_like(valid_BN)
    gone_BN[:, sources] = merges_BS
    stays_BN = valid_BN & ~gone_BN
    slot_BN = torch.where(stays_BN, stays_BN.long().cumsum(1) - 1, DROPPED)
    joined_BS = slot_BN[:, destinations].gather(1, partner_BS)
    slot_BN[:, sources] = torch.where(merges_BS, joined_BS, slot_BN[:, sources])
    mask_BK = torch.arange(slots, device=valid_BN.device) < stays_BN.sum(1, keepdim=True)
    return Plan.merge(slot_BN, mask_BK, sizes_BN)
