"""SVD-Prune: keep the tokens with the highest leverage on the image's main directions.

Apedo et al., "SVD-Prune: Training-Free Token Pruning For Efficient VLMs", 2026, arXiv 2604.11530.
Reconstructed from
its abstract and from follow-up work, which the share of energy and the mass budget are from.

Shape suffixes: B batch, I image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Traits
from pumer.reducers.ops.matching import unit_vectors
from pumer.reducers.ops.spectral import leverage
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates, encoded, image_states
from pumer.reducers.tokens import Tokens

FEATURES = ("encoder", "states")


@register
@dataclass(frozen=True)
class SVDPrune(Selector):
    """Keep the image tokens with the highest leverage on the directions with most of the energy.

    On CUDA the eigendecomposition needs one host-device sync.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        energy: share of the spectral energy (squared singular values) that the directions hold.
        mass: keep the fewest tokens whose leverage adds up to this share, at most `keep`; None
            keeps as many as `keep` says.
        features: "encoder", its output before the projector, or "states", the inputs of the
            language model. None: of the encoder, or the states where there is none, as in joint
            encoders.
        center: subtract the image's mean feature first; else the strongest direction is close to
            that mean.
        normalize: scale every feature to length 1 first, so that tokens of large norm do not
            dominate.

    Example:
        >>> llava = pumer.apply(llava, pumer.SVDPrune(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "svd-prune"
    energy: float = 0.9
    mass: float | None = None
    features: str | None = None
    center: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("energy", self.energy), ("mass", self.mass)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {share}")
        if self.features not in (None, *FEATURES):
            raise ValueError(f"features is one of {', '.join(FEATURES)}, not {self.features!r}")

    def resolve(self, model: ModelShape) -> Self:
        return (
            self
            if self.features
            else replace(self, features="encoder" if model.encoder else "states")
        )

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_encoder=frozenset() if self.features == "states" else frozenset({"features_BND"}),
            dynamic_length=self.mass is not None,
        )

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        by_encoder = self.features != "states"
        x_BID = encoded(tokens, "features_BND") if by_encoder else image_states(tokens)
        x_BID = x_BID.double()
        if self.center:
            count_B11 = valid_BI.sum(1)[:, None, None].clamp_min(1)
            x_BID = (x_BID - x_BID.sum(1, keepdim=True) / count_B11) * valid_BI[..., None]
        if self.normalize:
            x_BID = unit_vectors(x_BID, torch.float64)
        # Leverage sums to 1, so the largest ones up to `mass` are the fewest that hold it.
        leverage_BI = leverage(x_BID, self.energy)
        if self.mass is not None:
            falling = leverage_BI.sort(1, descending=True).values
            num_keep_B = torch.minimum(num_keep_B, (falling.cumsum(1) < self.mass).sum(1) + 1)
        return best(leverage_BI, valid_BI, num_keep_B)
