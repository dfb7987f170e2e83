"""The spectrum of the image's features: directions that hold its energy, and tokens' leverage.

In double precision, as squares of large features overflow in float32. On CUDA the
eigendecomposition needs one host-device sync.

Shape suffixes: B batch, I tokens, D channels, R directions (the smaller of I and D).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-9
"""Energies with a smaller relative difference count as equal."""


def energies(x_BID: Tensor) -> Tensor:
    """Squared singular values of every sample's matrix of features, falling, float64 [B,R].

    `x_BID` is finite.
    """
    rising: Tensor = torch.linalg.eigvalsh(_gram(x_BID.double()))
    return rising.flip(1).clamp_min(0)


def directions_for(share: float, energy_BR: Tensor) -> Tensor:
    """How many of the strongest directions hold this share of the energy, at least 1: int64 [B]."""
    wanted_B1 = share * (1 - ROUNDING) * energy_BR.sum(1, keepdim=True)
    reached = energy_BR.cumsum(1) >= wanted_B1
    return ((~reached).sum(1) + 1).clamp_max(energy_BR.shape[1])


def leverage(x_BID: Tensor, share: float) -> Tensor:
    """Each token's leverage on the directions that hold this share of the energy, float64 [B,I].

    A row sums to 1, unless the last direction is as strong as the next one: then all directions of
    that strength count, as they are not unique. Features that are all zero have no leverage.

    Args:
        x_BID: features, finite, zero at padding, which then has no leverage.
        share: of the energy.
    """
    # Scale every sample to a maximum of 1, so that one threshold fits all.
    x = x_BID.double()
    x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    values, vectors = torch.linalg.eigh(_gram(x))
    energy_BR, vectors = values.flip(1).clamp_min(0), vectors.flip(2)
    if x.shape[1] > x.shape[2]:  # right singular vectors: compute the left ones
        vectors = x @ vectors / energy_BR[:, None].sqrt().clamp_min(1e-12)
    count_B1 = directions_for(share, energy_BR)[:, None]
    weakest_B1 = energy_BR.gather(1, count_B1 - 1)
    strong_BR = (energy_BR >= weakest_B1 * (1 - ROUNDING)) & (energy_BR > 0)
    # Rounded, so that positions decide between equal leverages.
    summed: Tensor = (vectors.square() * strong_BR[:, None]).sum(2).round(decimals=5)
    return summed / count_B1


def _gram(x_BID: Tensor) -> Tensor:
    """Products of tokens or of channels, whichever are fewer: both have the same eigenvalues."""
    few_tokens = x_BID.shape[1] <= x_BID.shape[2]
    return x_BID @ x_BID.transpose(1, 2) if few_tokens else x_BID.transpose(1, 2) @ x_BID
