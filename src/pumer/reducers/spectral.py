"""The spectrum of the image's features: how many directions hold its energy, and which tokens span these.

On CUDA the eigen-decomposition makes the host wait once.

Shape suffixes: B batch, I tokens, D channels, R directions (the smaller of I and D).
"""

from __future__ import annotations

import torch
from torch import Tensor


def energies(x_BID: Tensor) -> Tensor:
    """Squared singular values of every sample's matrix of features, falling, float32 [B,R]."""
    rising: Tensor = torch.linalg.eigvalsh(_gram(x_BID))
    return rising.flip(1).clamp_min(0)


def directions_for(share: float, energy_BR: Tensor) -> Tensor:
    """How many of the strongest directions hold this share of the energy, at least 1: int64 [B]."""
    reached = energy_BR.cumsum(1) >= share * energy_BR.sum(1, keepdim=True)
    return ((~reached).sum(1) + 1).clamp_max(energy_BR.shape[1])


def leverage(x_BID: Tensor, share: float) -> Tensor:
    """Each token's part in the directions that hold this share of the energy, float32 [B,I]; a row sums to 1.

    Args:
        x_BID: features, zero at padding, which then has no leverage.
        share: of the energy.
    """
    x = x_BID.float()
    values, vectors = torch.linalg.eigh(_gram(x))
    energy_BR, vectors = values.flip(1).clamp_min(0), vectors.flip(2)
    if x.shape[1] > x.shape[2]:  # right singular vectors: bring them to the tokens' side
        vectors = x @ vectors / energy_BR[:, None].sqrt().clamp_min(1e-12)
    count_B = directions_for(share, energy_BR)
    strong = torch.arange(energy_BR.shape[1], device=x.device) < count_B[:, None]
    # In steps, so that where every token is a direction of its own their places tell, and not the last bit.
    summed: Tensor = (vectors.square() * strong[:, None]).sum(2).round(decimals=5)
    return summed / count_B[:, None]


def _gram(x_BID: Tensor) -> Tensor:
    """Products of tokens or of channels, whichever are fewer: both have the same eigenvalues."""
    x = x_BID.float()
    return x @ x.transpose(1, 2) if x.shape[1] <= x.shape[2] else x.transpose(1, 2) @ x
