"""Bipartite soft matching: which tokens are alike enough to become one (ToMe, ICLR 2023, section 3.1).

Shape suffixes: B batch, N tokens, A tokens at even positions, C tokens at odd positions, D key channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.plan import Plan


def rank(score_BN: Tensor) -> Tensor:
    """Place of every element when its row is sorted from high to low, ties in order of position: int64 [B,N]."""
    order = score_BN.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score_BN.shape[1], device=score_BN.device).expand(score_BN.shape)
    return torch.empty_like(order).scatter(1, order, places)


def rank_in_groups(score_BN: Tensor, group_BN: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Places when a row is sorted by group (numbers from 0), and from high to low inside each: int64, both [B,N].

    Returns:
        The place in the whole row, and the place inside the group.
    """
    order = score_BN.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group_BN.gather(1, order).argsort(dim=1, stable=True))
    places = torch.arange(score_BN.shape[1], device=score_BN.device).expand(score_BN.shape)
    place_BN = torch.empty_like(order).scatter(1, order, places)
    size_BG = torch.zeros(len(score_BN), groups, dtype=torch.int64, device=score_BN.device)
    size_BG = size_BG.scatter_add(1, group_BN, torch.ones_like(group_BN))
    return place_BN, place_BN - (size_BG.cumsum(1) - size_BG).gather(1, group_BN)


def partners(keys_BND: Tensor, valid_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Best partner at an odd position for every token at an even one.

    Args:
        keys_BND: what similarity is measured on (cosine).
        valid_BN: bool, false at padding, which is nobody's partner.

    Returns:
        similarity [B,A] (-inf where there is no partner) and the partner's number among the odd positions [B,A].
    """
    unit = torch.nn.functional.normalize(keys_BND.float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    allowed = valid_BN[:, ::2, None] & valid_BN[:, None, 1::2]
    return torch.where(allowed, similarity, -torch.inf).max(dim=-1)


def bipartite(
    keys_BND: Tensor, valid_BN: Tensor, merged: int | Tensor, slots: int, sizes_BN: Tensor | None = None
) -> Plan:
    """Merge the `merged` tokens at even positions that are most like a token at an odd position into it.

    Survivors keep their order; a group stands where its odd-positioned member stood.

    Args:
        keys_BND: what similarity is measured on.
        valid_BN: bool; real tokens come before padding, so that a padded row is matched as it would be alone.
        merged: how many tokens to merge away, at most half of the real ones: a number, or int64 [B].
        slots: number of slots, at least the real tokens less the merged ones of any row.
        sizes_BN: source tokens that each token stands for already (all one if not given): weights of the average.
    """
    if keys_BND.shape[1] < 2:
        return Plan.keep(valid_BN, slots)
    best_BA, partner_BA = partners(keys_BND, valid_BN)
    limit = merged[:, None] if isinstance(merged, Tensor) else merged
    return absorb((rank(best_BA) < limit) & best_BA.isfinite(), partner_BA, valid_BN, slots, sizes_BN)


def absorb(merges_BA: Tensor, partner_BA: Tensor, valid_BN: Tensor, slots: int, sizes_BN: Tensor | None = None) -> Plan:
    """Merge the marked tokens at even positions into their partners at odd ones.

    `valid_BN`, `slots` and `sizes_BN` are as in `bipartite`.
    """
    sizes = torch.ones_like(valid_BN, dtype=torch.float32) if sizes_BN is None else sizes_BN
    gone_BN = torch.zeros_like(valid_BN)
    gone_BN[:, ::2] = merges_BA
    stays_BN = valid_BN & ~gone_BN
    slot_BN = torch.where(stays_BN, stays_BN.long().cumsum(1) - 1, -1)
    slot_BA = torch.where(merges_BA, slot_BN[:, 1::2].gather(1, partner_BA), slot_BN[:, ::2])
    slot_BN[:, ::2] = slot_BA
    mask_BK = torch.arange(slots, device=valid_BN.device) < stays_BN.sum(1, keepdim=True)
    return Plan.merge(slot_BN, mask_BK, sizes)
