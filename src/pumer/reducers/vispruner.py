"""FasterVLM and VisPruner: the tokens that the encoder's [CLS] attends to, and diverse others.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs" (VisPruner), ICCV 2025; its first version, "[CLS] Attention is All You Need for Training-Free
Visual Token Pruning" (FasterVLM), 2024. Both arXiv 2412.01818.

Shape suffixes: B batch, I image tokens, L places in the list of remaining ones, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.greedy import cosines
from pumer.reducers.ops.matching import rank
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, best, candidates, check_saliency, encoded
from pumer.reducers.tokens import Tokens

AT_ONCE = 8
"""Tokens that VisPruner removes per round, as published."""


@register
@dataclass(frozen=True)
class FasterVLM(Selector):
    """Keep the image tokens that the vision encoder attends to most.

    The budget is per crop of an image.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        saliency: the attention that rates a token: of [CLS] ("class"), or of all ("received").

    Example:
        >>> llava = pumer.apply(llava, pumer.FasterVLM(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "fastervlm"
    saliency: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)

    @property
    def traits(self) -> Traits:
        return Traits(needs_encoder=frozenset({SALIENCY[self.saliency]}), per_crop=True)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return best(encoded(tokens, SALIENCY[self.saliency]), candidates(tokens), num_keep_B)


@register
@dataclass(frozen=True)
class VisPruner(FasterVLM):
    """Keep the image tokens attended to most, and of the others what is left without duplicates.

    Similarity is compared in float64, as published. Where an odd number of tokens is left, or more
    than half must go, the published code fails; here the list of even places is one longer, and no
    round takes more than half.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        important: share of the kept tokens that are chosen by attention, rounded down. Published:
            0.5, at 64 tokens 0.75.
        saliency: what attention rates a token, one of `SALIENCY`.

    Example:
        >>> llava = pumer.apply(llava, pumer.VisPruner(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "vispruner"
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important is a share in [0, 1], not {self.important}")

    @property
    def traits(self) -> Traits:
        traits = super().traits
        return replace(traits, needs_encoder=traits.needs_encoder | {"features_BND"})

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        place_BI = rank(encoded(tokens, SALIENCY[self.saliency]).masked_fill(~valid_BI, -torch.inf))
        important_B = (num_keep_B.double() * self.important).long()  # rounded down, as published
        important_BI = valid_BI & (place_BI < important_B[:, None])

        # The others, from most to least attended, as a list that is thinned out.
        order_BL = place_BI.argsort(1)
        start_BL = torch.arange(order_BL.shape[1], device=order_BL.device) + important_B[:, None]
        list_BL = order_BL.gather(1, start_BL.clamp_max(order_BL.shape[1] - 1))
        left_B = valid_BI.sum(1) - important_B
        cosine_BII = cosines(encoded(tokens, "features_BND"))
        list_BL = _without_duplicates(cosine_BII, list_BL, left_B, num_keep_B - important_B, most)
        places = torch.arange(list_BL.shape[1], device=list_BL.device)
        diverse_BI = torch.zeros_like(valid_BI).long()
        stays_BL = (places < (num_keep_B - important_B)[:, None]).long()
        return important_BI | diverse_BI.scatter_add(1, list_BL, stays_BL).bool()


def _without_duplicates(
    cosine_BII: Tensor, list_BL: Tensor, left_B: Tensor, wanted_B: Tensor, most: int
) -> Tensor:
    """Thin the first `left_B` tokens of the list out to `wanted_B`, which come first in the result.

    Each round removes up to eight tokens: those at even positions that are most similar to one at
    an odd position. The next list is the remaining even ones by falling similarity, then the odd
    ones.

    Args:
        most: the most tokens that any row keeps.
    """
    rows = torch.arange(len(list_BL), device=list_BL.device)[:, None]
    start = list_BL.shape[1]
    # Below sixteen tokens a round removes at most half: up to four more rounds.
    for step in range(-(-start // AT_ONCE) + 4 if start > 1 else 0):
        length = min(start, max(start - step * AT_ONCE, most, 2 * AT_ONCE))  # no row has more left
        list_BL = list_BL[:, :length]
        real_BL = torch.arange(length, device=list_BL.device) < left_B[:, None]
        even, odd = list_BL[:, ::2], list_BL[:, 1::2]
        alike = cosine_BII[rows[..., None], even[:, :, None], odd[:, None]]
        alike = alike.masked_fill(~real_BL[:, None, 1::2], -torch.inf).amax(2)
        removed_B = torch.minimum(left_B - wanted_B, left_B // 2).clamp(0, AT_ONCE)

        # Sort keys, rising: remaining even tokens by similarity, odd tokens, then removed ones.
        goes = rank(alike.masked_fill(~real_BL[:, ::2], -torch.inf)) < removed_B[:, None]
        key_BL = torch.empty_like(list_BL, dtype=cosine_BII.dtype)
        key_BL[:, ::2] = (-alike).masked_fill(goes | ~real_BL[:, ::2], torch.inf)
        key_BL[:, 1::2] = torch.full_like(key_BL[:, 1::2], 2.0).masked_fill(
            ~real_BL[:, 1::2], torch.inf
        )
        moving = (removed_B > 0)[:, None]
        list_BL = torch.where(
            moving, list_BL.gather(1, key_BL.argsort(dim=1, stable=True)), list_BL
        )
        left_B = left_B - removed_B
    return list_BL
