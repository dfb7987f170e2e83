"""PruMerge and PruMerge+: keep the outliers of [CLS]'s attention, merge the others into them.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV
2025, arXiv 2403.15388.

Shape suffixes: B batch, I image tokens, K slots, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.budget import Count, check_keep, smaller
from pumer.reducers.ops.greedy import cosines
from pumer.reducers.plan import Plan, tokens_at
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates, check_saliency, encoded
from pumer.reducers.tokens import Tokens

ATTENTION = {"class": "last_class_attention_BN", "received": "received_BN"}
"""The attention that rates tokens: of [CLS] in the tower's last layer, or, for encoders without
[CLS], of all tokens in the layer of the features, which is ours."""


@register
@dataclass(frozen=True)
class PruMerge(Selector):
    """Keep the image tokens with outlying attention, and evenly spaced ones; merge the others into
    these.

    Attention and keys are those of the tower's last layer, all heads taken as one. To every kept
    token its neighbours are added, the tokens with the most similar keys, each times its attention;
    kept tokens may be neighbours too. One extra token at the end is the sum of all other tokens,
    each times its attention. So weights do not sum to one, and a token may enter several.

    As published, except for the order (image order here, attention there), for images without an
    outlier (the published code fails; here the most attended token counts as one), and for images
    whose tokens are all kept (the published code appends a token of zeros).

    Args:
        keep: None keeps the outliers of each image, and the extra token. A share (float) or a
            number (int) keeps that many, the extra token included; with `plus`, a quarter of them
            by attention. If that is 1, the most attended token stays and the others are dropped.
            The fixed budget is ours.
        plus: also keep evenly spaced tokens, about three per outlier (PruMerge+).
        saliency: the attention that rates a token: of [CLS] ("class"), or of all ("received").
        neighbours: tokens added to each kept one; published: 32. 0 leaves the kept ones unchanged.

    Example:
        >>> llava = pumer.apply(llava, pumer.PruMerge(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "prumerge"
    added = ("neighbours",)
    keep: float | int | None = None  # type: ignore[assignment]
    plus: bool = True
    saliency: str = "class"
    neighbours: int = 32

    def __post_init__(self) -> None:
        check_saliency(self.saliency)
        if self.neighbours < 0:
            raise ValueError(f"neighbours is a number of tokens from 0, not {self.neighbours}")
        if self.keep is not None:
            check_keep(keep=self.keep)

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_encoder=frozenset({ATTENTION[self.saliency], "last_keys_BNC"}),
            dynamic_length=self.keep is None,
        )

    def budget(self, count: Count, layer: int) -> Count:
        """How many stay, the extra token included; without `keep` the most that may.

        Above the third quartile lie a quarter of the tokens.
        """
        if self.keep is not None:
            return super().budget(count, layer)
        return count if self.plus else smaller(-(-count // 4) + 1, count)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        if self.keep is not None or valid_BI.shape[1] == 0:
            return super().plan(tokens)
        keep_BI = self._outliers(tokens, valid_BI)
        if self.plus:
            count_B1, outliers_B1 = (x.sum(1, keepdim=True) for x in (valid_BI, keep_BI))
            step_B1 = (count_B1 // outliers_B1.clamp_min(1) // 3).clamp_min(1)
            position = torch.arange(valid_BI.shape[1], device=valid_BI.device)
            # The grid ends before the last token, as published.
            keep_BI = keep_BI | (position % step_B1 == 0) & (position < count_B1 - 1)
        extra_B = keep_BI.sum(1) < valid_BI.sum(1)
        most = self.budget(valid_BI.shape[1], tokens.layer)
        return tokens.with_structure(None, self._merged(tokens, keep_BI, extra_B, most))

    def reduce_to(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Plan:
        valid_BI = candidates(tokens)
        # One slot is the extra token's, unless all tokens stay or it would be the only one.
        extra_B = (num_keep_B < valid_BI.sum(1)) & (num_keep_B > 1)
        num_keep_B = num_keep_B - extra_B.long()
        attended_B = (
            torch.minimum((num_keep_B // 4).clamp_min(1), num_keep_B) if self.plus else num_keep_B
        )
        attended_BI = best(encoded(tokens, ATTENTION[self.saliency]), valid_BI, attended_B)

        # The others evenly spaced among those that are left.
        rest_BI = valid_BI & ~attended_BI
        place_BI = rest_BI.long().cumsum(1) - 1
        rest_B1 = rest_BI.sum(1, keepdim=True).clamp_min(1)
        spaced_B1 = (num_keep_B - attended_BI.sum(1))[:, None]
        spaced_BI = (place_BI + 1) * spaced_B1 // rest_B1 > place_BI * spaced_B1 // rest_B1
        return self._merged(tokens, attended_BI | rest_BI & spaced_BI, extra_B, most)

    def _outliers(self, tokens: Tokens, valid_BI: Tensor) -> Tensor:
        """Tokens with more attention than 1.5 quartile ranges above the third, at least one."""
        attention_BI = encoded(tokens, ATTENTION[self.saliency]).double()
        first_B, third_B = (_quantile(attention_BI, valid_BI, share) for share in (0.25, 0.75))
        outlying_BI = valid_BI & (attention_BI > (third_B + 1.5 * (third_B - first_B))[:, None])
        return best(attention_BI, valid_BI, outlying_BI.sum(1).clamp_min(1))

    def _merged(self, tokens: Tokens, keep_BI: Tensor, extra_B: Tensor, most: int) -> Plan:
        """The kept tokens, each with its neighbours, and behind them in some rows the extra one."""
        valid_BI = candidates(tokens)
        attention_BI = encoded(tokens, ATTENTION[self.saliency])
        keeping = Plan.keep(keep_BI, most)
        assert keeping.index_BK is not None

        # Which other tokens are neighbours of the one in every slot.
        place_I = torch.arange(valid_BI.shape[1], device=valid_BI.device)
        cosine_BKI = tokens_at(cosines(encoded(tokens, "last_keys_BNC")), keeping.index_BK)
        other_BKI = valid_BI[:, None] & (place_I != keeping.index_BK[..., None])
        order_BKI = cosine_BKI.masked_fill(~other_BKI, -torch.inf).argsort(
            dim=2, descending=True, stable=True
        )
        near_BKI = torch.zeros_like(other_BKI).scatter(2, order_BKI[..., : self.neighbours], True)
        near_BKI = near_BKI & other_BKI & keeping.mask_BK[..., None]

        # All that are not kept stand in the extra slot.
        num_keep_B1, extra_B1 = keep_BI.sum(1, keepdim=True), extra_B[:, None]
        rest_BI = valid_BI & ~keep_BI
        slot_BI = torch.where(rest_BI & extra_B1, num_keep_B1, keeping.slot_BN)
        weight_BI = torch.where(rest_BI, attention_BI, 1.0)
        mask_BK = torch.arange(most, device=valid_BI.device) < num_keep_B1 + extra_B1
        shares_BKI = Plan(slot_BI, weight_BI, mask_BK).matrix() + near_BKI * attention_BI[:, None]
        return Plan(slot_BI, weight_BI, mask_BK, shares_BKN=shares_BKI)


def _quantile(value_BI: Tensor, valid_BI: Tensor, share: float) -> Tensor:
    """The value that this share of a row's real tokens lie below, interpolated, [B]."""
    rising = value_BI.masked_fill(~valid_BI, torch.inf).sort(1).values
    place_B = share * (valid_BI.sum(1) - 1).clamp_min(0).double()
    below_B, above_B = place_B.floor(), place_B.ceil()
    low, high = (rising.gather(1, at_B[:, None].long())[:, 0] for at_B in (below_B, above_B))
    return low + (high - low) * (place_B - below_B)
