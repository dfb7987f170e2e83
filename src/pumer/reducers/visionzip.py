"""VisionZip: dominant tokens, and contextual tokens that the others are merged into.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv 2412.04467.

Shape suffixes: B batch, I image tokens, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.budget import portion
from pumer.reducers.ops.greedy import cosines
from pumer.reducers.plan import DROPPED, Plan
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, best, candidates, check_saliency, encoded
from pumer.reducers.tokens import Tokens


@register
@dataclass(frozen=True)
class VisionZip(Selector):
    """Keep the image tokens that the encoder attends to most; merge the others into a few of their
    own.

    As published, the tokens merged into a contextual token are averaged and added to it, so it
    becomes about twice as long. As published, features are merged before the projector, if the
    projector works token by token (`Traits.before_projector`); else after it. The budget is per
    crop of an image. The published code counts the encoder's [CLS] among the dominant tokens; here
    [CLS] does not enter the language model, so give one token less. Contextual tokens keep their
    position; the published code puts them last.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        contextual: how many of the kept tokens are contextual: a share (float) or a number (int).
            Published: 10 of 64, 20 of 128, 30 of 192.
        saliency: the attention that rates a token: of [CLS] ("class"), or of all ("received").

    Example:
        >>> llava = pumer.apply(llava, pumer.VisionZip(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "visionzip"
    contextual: float | int = 0.15625
    saliency: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        is_count = isinstance(self.contextual, int) and self.contextual >= 0
        if not (is_count or 0 <= self.contextual <= 1):
            raise ValueError(
                "contextual is a share in [0, 1] or a whole number of tokens such as 10, not "
                f"{self.contextual}"
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_encoder=frozenset({SALIENCY[self.saliency], "keys_BNC"}),
            per_crop=True,
            before_projector=True,
        )

    def reduce_to(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Plan:
        valid_BI = candidates(tokens)
        if isinstance(self.contextual, int):
            contextual_B = num_keep_B.clamp_max(self.contextual)
        else:
            contextual_B = portion(self.contextual, num_keep_B)
        attention_BI = encoded(tokens, SALIENCY[self.saliency])
        dominant_BI = best(attention_BI, valid_BI, num_keep_B - contextual_B)

        # Contextual tokens: evenly spaced among the others.
        rest_BI = valid_BI & ~dominant_BI
        place_BI = rest_BI.long().cumsum(1) - 1
        contextual_B1 = contextual_B[:, None]
        step_B1 = (rest_BI.sum(1, keepdim=True) // contextual_B1.clamp_min(1)).clamp_min(1)
        target_BI = rest_BI & (place_BI % step_B1 == 0) & (place_BI // step_B1 < contextual_B1)

        # Every other token goes into the contextual token with the most similar key.
        cosine_BII = cosines(encoded(tokens, "keys_BNC"))
        nearest_BI = cosine_BII.masked_fill(~target_BI[:, None], -torch.inf).argmax(2)
        keeping = Plan.keep(dominant_BI | target_BI, most)
        joined_BI = keeping.slot_BN.gather(1, nearest_BI).masked_fill(contextual_B1 == 0, DROPPED)
        merged_BI = rest_BI & ~target_BI
        slot_BI = torch.where(merged_BI, joined_BI, keeping.slot_BN)
        count_BK = Plan(slot_BI, keeping.weight_BN, keeping.mask_BK).total(merged_BI.float())
        share_BI = 1 / count_BK.gather(1, slot_BI.clamp_min(0)).clamp_min(1)
        return Plan(slot_BI, torch.where(merged_BI, share_BI, 1.0), keeping.mask_BK)
