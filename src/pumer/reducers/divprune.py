"""DivPrune: keep a set of tokens that are far from each other.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
2025, arXiv 2503.02175.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pumer.reducers.ops.greedy import cosines, farthest_first
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, candidates, image_states
from pumer.reducers.tokens import Tokens


@register
@dataclass(frozen=True)
class DivPrune(Selector):
    """Keep image tokens of which the two most alike are as unlike as can be: one by one, the
    farthest from those kept.

    Distance is one minus the cosine of what the language model is given. Budget and choice are one
    for the whole image, as published.

    Args:
        keep: image tokens that stay: a share of the image's own number (float), or a whole number
            (int).
    """

    name = "divprune"
    keep: float | int = 0.098

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return farthest_first(cosines(image_states(tokens)), candidates(tokens), num_keep_B, most)
