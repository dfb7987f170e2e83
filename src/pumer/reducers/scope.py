"""SCOPE: tokens that stand for all the others, and of these the salient ones.

Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025, arXiv
2510.24214.

Shape suffixes: B batch, I image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pumer.reducers.base import Tokens
from pumer.reducers.greedy import cosines, coverage
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, candidates, check_saliency, encoded, image_states


@register
@dataclass(frozen=True)
class SCOPE(Selector):
    """Choose one by one the image token that adds most coverage, times its saliency.

    Coverage is the sum, over all image tokens, of the cosine with the nearest token chosen.

    Args:
        saliency: attention of the "class" token, or that "received" from all.
        alpha: power of the saliency; 0 leaves coverage alone.
    """

    name = "scope"
    saliency: str = "class"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        if self.alpha < 0:
            raise ValueError(f"alpha is a power from 0, not {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SALIENCY[self.saliency]})

    def chosen(self, tokens: Tokens, kept_B: Tensor, most: int) -> Tensor:
        weight_BI = encoded(tokens, SALIENCY[self.saliency]).clamp_min(0).pow(self.alpha)
        return coverage(cosines(image_states(tokens)), weight_BI, candidates(tokens), kept_B, most)
