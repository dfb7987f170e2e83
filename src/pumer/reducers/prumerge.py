"""PruMerge and PruMerge+: keep the outliers of the [CLS] token's attention, merge the others into them.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv
2403.15388.

Shape suffixes: B batch, I image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Tokens
from pumer.reducers.budget import Count, check_keep
from pumer.reducers.greedy import cosines
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, best, candidates, check_saliency, encoded


@register
@dataclass(frozen=True)
class PruMerge(Selector):
    """Keep the image tokens whose attention is an outlier, and evenly spaced ones besides; merge the others into these.

    A dropped token is added, times the attention it has, to the kept one whose key is most like its own. The published
    code adds to every kept token the 32 tokens most like it, so that one token enters many, and puts a sum of all
    dropped ones at the end; weights are as small there as here, about one in the number of tokens.

    Args:
        keep: None keeps as many as there are outliers, each image its own number. A share or a whole number keeps that
            many: with `plus` a quarter of them by attention.
        plus: keep evenly spaced tokens as well, about three to an outlier (PruMerge+).
        saliency: attention of the "class" token, or that "received" from all.
    """

    name = "prumerge"
    keep: float | int | None = None  # type: ignore[assignment]
    plus: bool = True
    saliency: str = "class"

    def __post_init__(self) -> None:
        check_saliency(self.saliency)
        if self.keep is not None:
            check_keep(keep=self.keep)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SALIENCY[self.saliency], "keys_BNC"})

    @property
    def leaves_gaps(self) -> bool:
        return self.keep is None

    def budget(self, count: Count, layer: int) -> Count:
        """How many stay; without `keep` the most that may. Above the third quartile lie a quarter of the tokens."""
        if self.keep is not None:
            return super().budget(count, layer)
        return count if self.plus else -(-count // 4)

    def reduce_to(self, tokens: Tokens, kept_B: Tensor, most: int) -> Plan:
        valid_BI, attention_BI = candidates(tokens), encoded(tokens, SALIENCY[self.saliency])
        outlying_B = (kept_B // 4).clamp_min(1) if self.plus else kept_B
        outlying_BI = best(attention_BI, valid_BI, torch.minimum(outlying_B, kept_B))
        rest_BI = valid_BI & ~outlying_BI
        place_BI = rest_BI.long().cumsum(1) - 1
        rest_B1, more_B1 = rest_BI.sum(1, keepdim=True).clamp_min(1), (kept_B - outlying_BI.sum(1))[:, None]
        spaced_BI = rest_BI & ((place_BI + 1) * more_B1 // rest_B1 > place_BI * more_B1 // rest_B1)
        return self._merged(tokens, outlying_BI | spaced_BI, most)

    def plan(self, tokens: Tokens) -> Plan:
        if self.keep is not None:
            return super().plan(tokens)
        valid_BI, attention_BI = candidates(tokens), encoded(tokens, SALIENCY[self.saliency])
        count_B = valid_BI.sum(1)
        first, third = (_quantile(attention_BI, valid_BI, share) for share in (0.25, 0.75))
        outlying_BI = attention_BI > (third + 1.5 * (third - first))[:, None]
        # An image without outliers keeps its most attended token.
        outlying_B = (outlying_BI & valid_BI).sum(1).clamp_min(1)
        keep_BI = best(attention_BI, valid_BI, outlying_B)
        if self.plus:
            step_B1 = (count_B // outlying_B // 3).clamp_min(1)[:, None]
            place = torch.arange(valid_BI.shape[1], device=valid_BI.device)
            keep_BI = keep_BI | valid_BI & (place % step_B1 == 0) & (place < count_B[:, None] - 1)
        image = self._merged(tokens, keep_BI, self.budget(valid_BI.shape[1], tokens.layer))
        return tokens.with_structure(None, image)

    def _merged(self, tokens: Tokens, keep_BI: Tensor, most: int) -> Plan:
        """Every other token in the kept one that its key is most like, with its attention for a share."""
        keeping = Plan.keep(keep_BI, most)
        similarity = cosines(encoded(tokens, "keys_BNC")).masked_fill(~keep_BI[:, None], -torch.inf)
        merged_BI = candidates(tokens) & ~keep_BI
        slot_BI = torch.where(merged_BI, keeping.slot_BN.gather(1, similarity.argmax(2)), keeping.slot_BN)
        share_BI = torch.where(merged_BI, encoded(tokens, SALIENCY[self.saliency]), 1.0)
        return Plan(slot_BI, share_BI, keeping.mask_BK)


def _quantile(value_BI: Tensor, valid_BI: Tensor, share: float) -> Tensor:
    """The value that this share of a row's real tokens lie below, between two of them in proportion, [B]."""
    rising = value_BI.masked_fill(~valid_BI, torch.inf).sort(1).values
    place_B = share * (valid_BI.sum(1) - 1).clamp_min(0).double()
    low, high = (rising.gather(1, place[:, None].long())[:, 0] for place in (place_B.floor(), place_B.ceil()))
    return low + (high - low) * (place_B - place_B.floor()).float()
