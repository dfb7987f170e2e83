"""HoloV: a budget for every part of the picture, so that no part is lost.

Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS
2025, arXiv 2510.02912.

Shape suffixes: B batch, I image tokens, P chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Tokens
from pumer.reducers.greedy import cosines
from pumer.reducers.matching import rank, rank_in_groups
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, best, candidates, check_saliency, encoded, image_states

ATTENTION, VARIETY = 1000.0, 0.09
"""Published weights of attention and of how much a token's similarities to the others of its chunk vary."""


@register
@dataclass(frozen=True)
class HoloV(Selector):
    """Share the budget among chunks of the picture by attention and variety; in each, keep what is attended to most.

    Reconstructed where the published code leaves it open: variety is brought to the scale of attention over the whole
    image; chunks whose quota exceeds them give what is over to the most attended tokens of all.

    Args:
        chunks: how many, in raster order, of the same length but for the last.
        saliency: attention of the "class" token, or that "received" from all.
    """

    name = "holov"
    chunks: int = 16
    saliency: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        if self.chunks < 1:
            raise ValueError(f"there is at least one chunk, not {self.chunks}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SALIENCY[self.saliency]})

    def chosen(self, tokens: Tokens, kept_B: Tensor, most: int) -> Tensor:
        valid_BI, attention_BI = candidates(tokens), encoded(tokens, SALIENCY[self.saliency])
        length_B1 = valid_BI.sum(1, keepdim=True)
        size_B1 = ((length_B1 + self.chunks - 1) // self.chunks).clamp_min(1)
        place = torch.arange(valid_BI.shape[1], device=valid_BI.device)
        chunk_BI = torch.where(valid_BI, place // size_B1, self.chunks)
        variety_BI = _variety(cosines(image_states(tokens)), chunk_BI, valid_BI)

        attention_BI = ATTENTION * attention_BI
        scale_B1 = attention_BI.abs().sum(1, keepdim=True) / variety_BI.sum(1, keepdim=True).clamp_min(1e-12)
        count_BP = _per_chunk(valid_BI.float(), chunk_BI, self.chunks)
        mean_BP = _per_chunk(attention_BI + VARIETY * variety_BI * scale_B1, chunk_BI, self.chunks)
        mean_BP = mean_BP / count_BP.clamp_min(1)
        share_BP = mean_BP / mean_BP.sum(1, keepdim=True).clamp_min(1e-12)
        quota_BP = (kept_B[:, None] * share_BP).floor().long()
        quota_BP = quota_BP + (rank(mean_BP) < (kept_B - quota_BP.sum(1))[:, None])

        quota_BI = torch.nn.functional.pad(quota_BP, (0, 1)).gather(1, chunk_BI)
        _, within_BI = rank_in_groups(attention_BI, chunk_BI, self.chunks + 1)
        chosen_BI = valid_BI & (within_BI < quota_BI)
        return chosen_BI | best(attention_BI, valid_BI & ~chosen_BI, kept_B - chosen_BI.sum(1))


def _variety(cosine_BII: Tensor, chunk_BI: Tensor, valid_BI: Tensor) -> Tensor:
    """Variance of each token's similarities to its chunk, its own counted as zero, [B,I]."""
    together = (chunk_BI[:, :, None] == chunk_BI[:, None]) & valid_BI[:, None]
    others = (together.sum(2) - 1).clamp_min(1)
    itself = torch.eye(cosine_BII.shape[1], dtype=torch.bool, device=cosine_BII.device)
    cosine_BII = cosine_BII.masked_fill(itself | ~together, 0.0)
    mean_BI = cosine_BII.sum(2) / others
    spread = (cosine_BII - mean_BI[..., None]).square() * together
    return spread.sum(2) / others * valid_BI


def _per_chunk(value_BI: Tensor, chunk_BI: Tensor, chunks: int) -> Tensor:
    return value_BI.new_zeros(len(value_BI), chunks + 1).scatter_add(1, chunk_BI, value_BI)[:, :chunks]
