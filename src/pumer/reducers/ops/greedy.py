"""Greedy selection of a set of tokens, one token per step.

All samples of a batch step together, as often as the largest budget needs; rows that are complete
ignore further steps. There is no host-device sync.

Shape suffixes: B batch, I candidates, R what they cover, D channels, K steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.ops.matching import unit_vectors


def cosines(x_BID: Tensor) -> Tensor:
    """Cosine similarity of all pairs, float64 [B,I,I]; zero with tokens that are all zero.

    Rounded to 1e-10: between equal tokens, such as those of a blank wall, the position decides, not
    the last bit, which depends on the amount of padding.
    """
    unit = unit_vectors(x_BID, torch.float64)
    return (unit @ unit.transpose(1, 2)).round(decimals=10)


def farthest_first(cosine_BII: Tensor, valid_BI: Tensor, num_keep_B: Tensor, most: int) -> Tensor:
    """The token farthest from its nearest neighbour, then always the one farthest from those
    chosen.

    Returns:
        Which tokens are chosen, bool [B,I].
    """
    # The first token is the one farthest from its nearest neighbour.
    distance = 1 - cosine_BII
    itself = torch.eye(valid_BI.shape[1], dtype=torch.bool, device=valid_BI.device)
    nearest = distance.masked_fill(itself | ~valid_BI[:, None], torch.inf).amin(2)
    chosen = torch.zeros_like(valid_BI)
    for step in range(most):
        pick_B1 = _best(nearest, valid_BI & ~chosen)
        chosen = _with(chosen, pick_B1, step < num_keep_B)
        to_pick = _row(distance, pick_B1)
        nearest = to_pick if step == 0 else torch.minimum(nearest, to_pick)
    return chosen


def determinantal(kernel_BII: Tensor, valid_BI: Tensor, num_keep_B: Tensor, most: int) -> Tensor:
    """The greedy set of largest determinant (Chen et al., "Fast greedy MAP inference", NeurIPS
    2018).

    If the rank of the kernel is below the budget, rounding decides on the last tokens.

    Returns:
        Which tokens are chosen, bool [B,I].
    """
    chosen = torch.zeros_like(valid_BI)
    left_BI = kernel_BII.diagonal(dim1=1, dim2=2)
    factor_BKI = kernel_BII.new_zeros(len(kernel_BII), most, valid_BI.shape[1])
    for step in range(most):
        pick_B1 = _best(left_BI, valid_BI & ~chosen)
        chosen = _with(chosen, pick_B1, step < num_keep_B)
        # One step of a Cholesky factorization, with the chosen token as pivot.
        before = factor_BKI[:, :step]
        picked = before.gather(2, pick_B1[:, None].expand(-1, step, -1))
        explained = (picked * before).sum(1)
        length_B1 = left_BI.gather(1, pick_B1).clamp_min(1e-30).sqrt()
        added = (_row(kernel_BII, pick_B1) - explained) / length_B1
        factor_BKI[:, step] = added
        left_BI = (left_BI - added.square()).clamp_min(0)
    return chosen


def coverage(
    cover_BIR: Tensor,
    weight_BI: Tensor,
    bonus_BI: Tensor,
    valid_BI: Tensor,
    num_keep_B: Tensor,
    most: int,
    decimals: int = 9,
) -> Tensor:
    """Greedy maximum coverage: gain in coverage times weight, plus bonus.

    Coverage is the sum, over everything to be covered, of the largest cover by a selected token, at
    least 0.

    Args:
        cover_BIR: how much each token covers of each thing, such as the cosines of all pairs.
        weight_BI: of every token.
        bonus_BI: of every token.
        valid_BI: bool, false at padding.
        num_keep_B: how many tokens of each row are chosen.
        most: the largest of these.
        decimals: to which gains are rounded.

    Returns:
        Which tokens are chosen, bool [B,I].
    """
    chosen = torch.zeros_like(valid_BI)
    covered_BR = cover_BIR.new_zeros(len(cover_BIR), cover_BIR.shape[2])
    for step in range(most):
        # Rounded, so that two tokens that cover only each other have the same gain.
        gain_BI = (cover_BIR - covered_BR[:, None]).clamp_min(0).sum(2).round(decimals=decimals)
        pick_B1 = _best(gain_BI * weight_BI + bonus_BI, valid_BI & ~chosen)
        chosen = _with(chosen, pick_B1, step < num_keep_B)
        covered_BR = torch.maximum(covered_BR, _row(cover_BIR, pick_B1))
    return chosen


def _best(score_BI: Tensor, free_BI: Tensor) -> Tensor:
    # argmax would select NaN; scores may be infinite.
    score_BI = torch.nan_to_num(score_BI, nan=torch.finfo(score_BI.dtype).min)
    return score_BI.masked_fill(~free_BI, -torch.inf).argmax(1, keepdim=True)


def _with(chosen_BI: Tensor, pick_B1: Tensor, counts_B: Tensor) -> Tensor:
    places = torch.arange(chosen_BI.shape[1], device=chosen_BI.device)
    return chosen_BI | (places == pick_B1) & counts_B[:, None]


def _row(matrix_BII: Tensor, pick_B1: Tensor) -> Tensor:
    return matrix_BII.gather(1, pick_B1[..., None].expand(-1, 1, matrix_BII.shape[2]))[:, 0]
