"""Density-peak clustering: centres are dense and far from denser tokens (Rodriguez and Laio,
Science 2014).

Shape suffixes: B batch, M tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.ops.matching import rank


def density_peaks(x_BMD: Tensor, valid_BM: Tensor, clusters_B: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of clusters, and the centre nearest to every token.

    Density is over as many nearest neighbours as there are clusters, the token itself included. Of
    equally dense tokens the earlier one counts as denser.

    Args:
        x_BMD: features for the distance (Euclidean, divided by the root of D).
        valid_BM: bool, false at padding.
        clusters_B: how many clusters each row forms, at most its tokens.

    Returns:
        which tokens are centres, bool [B,M], and the index of each token's centre [B,M], for a
        centre its own.
    """
    x = x_BMD.float()
    # Without a matrix product, whose rounding would dominate the distance of near-equal tokens.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    # Infinity marks what is no pair, so clamp overflowing distances.
    distance = distance.clamp_max(torch.finfo(torch.float32).max)
    pairs = valid_BM[:, :, None] & valid_BM[:, None]

    # Density of every token, from its nearest neighbours.
    numbers = torch.arange(x.shape[1], device=x.device)
    nearest = distance.masked_fill(~pairs, torch.inf).sort(2).values
    counted_BM = numbers < clusters_B[:, None]
    near = torch.where(counted_BM[:, None] & nearest.isfinite(), nearest, 0.0)
    density_BM = (-near.square().sum(2) / clusters_B[:, None].clamp_min(1)).exp()

    # Distance to the nearest denser token; peaks are high in both.
    place_BM = rank(density_BM.masked_fill(~valid_BM, -1.0))
    denser = (place_BM[:, None] < place_BM[:, :, None]) & pairs
    to_denser_BM = distance.masked_fill(~denser, torch.inf).amin(2)
    widest_B1 = distance.masked_fill(~pairs, 0).amax((1, 2))[:, None]
    peak_BM = density_BM * torch.where(to_denser_BM.isfinite(), to_denser_BM, widest_B1)

    centre_BM = valid_BM & (rank(peak_BM.masked_fill(~valid_BM, -1.0)) < clusters_B[:, None])
    nearest_BM = distance.masked_fill(~centre_BM[:, None], torch.inf).argmin(2)
    return centre_BM, torch.where(centre_BM, numbers, nearest_BM)
