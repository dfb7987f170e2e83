"""HoloV: a budget for every part of the image, so that its context is kept.

Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
Retention", NeurIPS 2025, arXiv 2510.02912.

Shape suffixes: B batch, I image tokens, P chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.greedy import cosines
from pumer.reducers.ops.matching import rank, rank_in_groups
from pumer.reducers.registry import register
from pumer.reducers.selector import (
    SALIENCY,
    Selector,
    best,
    candidates,
    check_saliency,
    encoded,
    image_states,
)
from pumer.reducers.tokens import Tokens

ATTENTION, VARIETY = 1000.0, 0.09
"""Published weights of attention, and of the variance of a token's similarities in its chunk."""


@register
@dataclass(frozen=True)
class HoloV(Selector):
    """Divide the budget among chunks of the image; in each, keep the most attended tokens.

    A chunk's quota follows the mean attention and variance of its tokens.

    As published, unless the quota of a chunk exceeds its tokens: the published code then returns
    rows of zeros; here the most attended of the remaining tokens fill the budget.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        chunks: number of chunks, in raster order; the first ones get the remainder. "auto" is the
            published number for Qwen2.5-VL, int(1024 / 576 * tokens / kept tokens).
        saliency: the attention that rates a token: of [CLS] ("class"), or of all ("received").

    Example:
        >>> llava = pumer.apply(llava, pumer.HoloV(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "holov"
    chunks: int | str = 16
    saliency: str = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self.saliency)
        if self.chunks != "auto" and not (isinstance(self.chunks, int) and self.chunks >= 1):
            raise ValueError(f'chunks is "auto" or at least one chunk, not {self.chunks!r}')

    @property
    def traits(self) -> Traits:
        return Traits(needs_encoder=frozenset({SALIENCY[self.saliency]}))

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        # Double: a thousand times the largest float32 is not finite.
        attention_BI = ATTENTION * encoded(tokens, SALIENCY[self.saliency]).double()
        chunk_BI, chunks = self._chunks(valid_BI, num_keep_B)
        variety_BI = _variety(cosines(image_states(tokens)), chunk_BI, valid_BI, chunks)

        # Every chunk's share of the budget, from the mean score of its tokens.
        total_BP = _per_chunk(attention_BI + VARIETY * variety_BI, chunk_BI, chunks)
        size_BP = _per_chunk(valid_BI.double(), chunk_BI, chunks)
        mean_BP = (total_BP / size_BP.clamp_min(1)).clamp_min(0)
        share_BP = mean_BP / mean_BP.sum(1, keepdim=True).clamp_min(1e-300)
        quota_BP = (num_keep_B[:, None] * share_BP).floor().long()
        quota_BP = quota_BP + (rank(mean_BP) < (num_keep_B - quota_BP.sum(1))[:, None])

        quota_BI = torch.nn.functional.pad(quota_BP, (0, 1)).gather(1, chunk_BI)
        _, within_BI = rank_in_groups(attention_BI, chunk_BI, chunks + 1)
        chosen_BI = valid_BI & (within_BI < quota_BI)
        return chosen_BI | best(attention_BI, valid_BI & ~chosen_BI, num_keep_B - chosen_BI.sum(1))

    def _chunks(self, valid_BI: Tensor, num_keep_B: Tensor) -> tuple[Tensor, int]:
        """The chunk of every token, int64 [B,I], and the most that there are: that of padding."""
        count_B1 = valid_BI.sum(1, keepdim=True)
        if isinstance(self.chunks, int):
            most = self.chunks
            chunks_B1 = torch.full_like(count_B1, most)
        else:
            most = max(1, 1024 * valid_BI.shape[1] // 576)
            wanted_B1 = 1024 * count_B1.double() / 576 / num_keep_B[:, None].clamp_min(1)
            chunks_B1 = wanted_B1.long().clamp(1, most)
        # The first `longer` chunks have `size` + 1 tokens, all others `size`.
        size_B1, longer_B1 = count_B1 // chunks_B1, count_B1 % chunks_B1
        place_BI = torch.arange(valid_BI.shape[1], device=valid_BI.device).expand_as(valid_BI)
        behind_BI = place_BI - longer_B1 * (size_B1 + 1)
        chunk_BI = torch.where(
            behind_BI < 0,
            place_BI // (size_B1 + 1),
            longer_B1 + behind_BI // size_B1.clamp_min(1),
        )
        return torch.where(valid_BI, chunk_BI, most), most


def _variety(cosine_BII: Tensor, chunk_BI: Tensor, valid_BI: Tensor, chunks: int) -> Tensor:
    """Variance of each token's similarities to its chunk, its own counted as zero, [B,I].

    Scaled so that it goes from 0 to 1 in every chunk.
    """
    together = (chunk_BI[:, :, None] == chunk_BI[:, None]) & valid_BI[:, None]
    others = (together.sum(2) - 1).clamp_min(1)
    itself = torch.eye(cosine_BII.shape[1], dtype=torch.bool, device=cosine_BII.device)
    cosine_BII = cosine_BII.masked_fill(itself | ~together, 0.0)
    mean_BI = cosine_BII.sum(2) / others
    spread = (cosine_BII - mean_BI[..., None]).square() * together
    variance_BI = spread.sum(2) / others

    edges_BP = variance_BI.new_zeros(len(variance_BI), chunks + 1)
    low_BP = edges_BP.scatter_reduce(1, chunk_BI, variance_BI, "amin", include_self=False)
    high_BP = edges_BP.scatter_reduce(1, chunk_BI, variance_BI, "amax", include_self=False)
    low_BI, high_BI = low_BP.gather(1, chunk_BI), high_BP.gather(1, chunk_BI)
    return (variance_BI - low_BI) / (high_BI - low_BI).clamp_min(1e-9) * valid_BI


def _per_chunk(value_BI: Tensor, chunk_BI: Tensor, chunks: int) -> Tensor:
    """Sums of every chunk, [B,P]."""
    total = value_BI.new_zeros(len(value_BI), chunks + 1)
    return total.scatter_add(1, chunk_BI, value_BI)[:, :chunks]
