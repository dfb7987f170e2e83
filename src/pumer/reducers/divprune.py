"""DivPrune: keep a diverse set of tokens, far from each other.

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
    """Keep the most diverse image tokens: one by one, the token farthest from those kept (max-min
    distance).

    Distance is one minus the cosine of the language model's inputs. Budget and selection are per
    image, not per crop, as published.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).

    Example:
        >>> llava = pumer.apply(llava, pumer.DivPrune(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "divprune"
    keep: float | int = 0.098

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return farthest_first(cosines(image_states(tokens)), candidates(tokens), num_keep_B, most)
