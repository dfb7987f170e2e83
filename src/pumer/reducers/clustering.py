"""Density-peak clustering: centres are dense and far from anything denser (Rodriguez and Laio, Science 2014).

Shape suffixes: B batch, M tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.matching import rank

NEIGHBOURS = 5
"""A token's density is told by this many nearest ones, itself included."""


def density_peaks(x_BMD: Tensor, valid_BM: Tensor, clusters_B: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of clusters, and the centre nearest to every token.

    Args:
        x_BMD: what distance (Euclidean, over the root of D) is measured on.
        valid_BM: bool, false at padding.
        clusters_B: how many clusters each row forms, at most its tokens.

    Returns:
        which tokens are centres, bool [B,M], and the place of each token's centre [B,M]: a centre's own is its own.
    """
    x = x_BMD.float()
    # Not by a matrix product: near twins would be told apart by what its rounding leaves of their difference.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    pairs = valid_BM[:, :, None] & valid_BM[:, None]

    near = distance.masked_fill(~pairs, torch.inf).sort(2).values[..., :NEIGHBOURS]
    counted = near.isfinite()
    density_BM = (-near.masked_fill(~counted, 0).square().sum(2) / counted.sum(2).clamp_min(1)).exp()

    place_BM = rank(density_BM.masked_fill(~valid_BM, -1.0))
    denser = (place_BM[:, None] < place_BM[:, :, None]) & pairs
    to_denser_BM = distance.masked_fill(~denser, torch.inf).amin(2)
    widest_B1 = distance.masked_fill(~pairs, 0).amax((1, 2))[:, None]
    peak_BM = density_BM * torch.where(to_denser_BM.isfinite(), to_denser_BM, widest_B1)

    centre_BM = valid_BM & (rank(peak_BM.masked_fill(~valid_BM, -1.0)) < clusters_B[:, None])
    nearest_BM = distance.masked_fill(~centre_BM[:, None], torch.inf).argmin(2)
    places = torch.arange(x.shape[1], device=x.device)
    return centre_BM, torch.where(centre_BM, places, nearest_BM)
