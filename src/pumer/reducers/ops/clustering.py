"""Density-peak clustering: centres are dense and far from anything denser (Rodriguez and Laio,
Science 2014).

Shape suffixes: B batch, M tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.ops.matching import rank


def density_peaks(x_BMD: Tensor, valid_BM: Tensor, clusters_B: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of clusters, and the centre nearest to every token.

    Density counts as many nearest neighbours as there will be clusters, the token itself included.
    Of equally dense tokens the earlier one counts as denser.

    Args:
        x_BMD: what distance (Euclidean, over the root of D) is measured on.
        valid_BM: bool, false at padding.
        clusters_B: how many clusters each row forms, at most its tokens.

    Returns:
        which tokens are centres, bool [B,M], and the place of each token's centre [B,M]: a centre's
        own is its own.
    """
    x = x_BMD.float()
    # Not by a matrix product: near twins would be told apart by what its rounding leaves of their
    # difference.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    # Infinity is for what is no pair, also where a difference is too large for a number.
    distance = distance.clamp_max(torch.finfo(torch.float32).max)
    pairs = valid_BM[:, :, None] & valid_BM[:, None]

    numbers = torch.arange(x.shape[1], device=x.device)
    nearest = distance.masked_fill(~pairs, torch.inf).sort(2).values
    counted_BM = numbers < clusters_B[:, None]
    near = torch.where(counted_BM[:, None] & nearest.isfinite(), nearest, 0.0)
    density_BM = (-near.square().sum(2) / clusters_B[:, None].clamp_min(1)).exp()

    place_BM = rank(density_BM.masked_fill(~valid_BM, -1.0))
    denser = (place_BM[:, None] < place_BM[:, :, None]) & pairs
    to_denser_BM = distance.masked_fill(~denser, torch.inf).amin(2)
    widest_B1 = distance.masked_fill(~pairs, 0).amax((1, 2))[:, None]
    peak_BM = density_BM * torch.where(to_denser_BM.isfinite(), to_denser_BM, widest_B1)

    centre_BM = valid_BM & (rank(peak_BM.masked_fill(~valid_BM, -1.0)) < clusters_B[:, None])
    nearest_BM = distance.masked_fill(~centre_BM[:, None], torch.inf).argmin(2)
    return centre_BM, torch.where(centre_BM, numbers, nearest_BM)
