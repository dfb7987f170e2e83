"""FastV: prune image tokens that a decoder does not attend to after its first layers.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.saliency import last_text_attention
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates
from pumer.reducers.tokens import Tokens


@register
@dataclass(frozen=True)
class FastV(Selector):
    """Keep the image tokens that the last token of the prompt attends to most (mean over heads).

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        layer: the first layer that runs with fewer tokens; attention is that of the layer before.

    Example:
        >>> llava = pumer.apply(llava, pumer.FastV(keep=0.25, layer=1))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "fastv"
    keep: float | int = 0.5
    layer: int = 2
    layer_offset = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ValueError(
                "FastV reads the attention of the layer before, so layer is at least 1, not "
                f"{self.layer}"
            )

    @property
    def traits(self) -> Traits:
        return Traits(needs_text=True)

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer - 1,)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return best(
            last_text_attention(tokens)[:, tokens.num_prefix_tokens :],
            candidates(tokens),
            num_keep_B,
        )
