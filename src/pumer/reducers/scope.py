"""SCOPE: tokens that cover all others, weighted by their saliency.

Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
NeurIPS 2025, arXiv 2510.24214.

Shape suffixes: B batch, I image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.greedy import cosines, coverage
from pumer.reducers.registry import register
from pumer.reducers.selector import (
    SALIENCY,
    Selector,
    candidates,
    check_saliency,
    encoded,
    image_states,
)
from pumer.reducers.tokens import Tokens

COMBINE = ("multiply", "add")


@register
@dataclass(frozen=True)
class SCOPE(Selector):
    """Select, one by one, the image token with the largest gain in coverage times saliency.

    Coverage is the sum over all image tokens of the cosine with the most similar selected token. It
    is measured on the encoder's output before the projector, as published, or on the language
    model's inputs if that is not available. The budget is per crop of an image.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        saliency: the attention that rates a token: of [CLS] ("class"), or of all ("received").
        alpha: power of the saliency; 0 leaves coverage alone.
        combine: "multiply" coverage and saliency, or "add" `alpha` times the saliency, a variant of
            the published code. That sums attention over heads, here it is averaged: set `alpha` to
            the number of the tower's heads for the published variant.

    Example:
        >>> llava = pumer.apply(llava, pumer.SCOPE(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "scope"
    saliency: str = "class"
    alpha: float = 1.0
    combine: str = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        if self.alpha < 0:
            raise ValueError(f"alpha is a power from 0, not {self.alpha}")
        if self.combine not in COMBINE:
            raise ValueError(f"combine is one of {', '.join(COMBINE)}, not {self.combine!r}")

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_encoder=frozenset({SALIENCY[self.saliency], "features_BND"}), per_crop=True
        )

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        # Saliency as a factor of the gain in coverage, or as a term added to it.
        saliency_BI = encoded(tokens, SALIENCY[self.saliency]).double()
        if self.combine == "add":
            weight_BI, bonus_BI = torch.ones_like(saliency_BI), self.alpha * saliency_BI
        else:
            weight_BI = saliency_BI.clamp_min(0).pow(self.alpha)
            bonus_BI = torch.zeros_like(saliency_BI)

        # Similarity of all pairs, on the encoder's features where available.
        encoder = tokens.encoder
        by_encoder = encoder is not None and encoder.features_BND is not None
        features_BID = encoded(tokens, "features_BND") if by_encoder else image_states(tokens)
        cosine_BII = cosines(features_BID)
        return coverage(cosine_BII, weight_BI, bonus_BI, candidates(tokens), num_keep_B, most)
