"""CDPruner: tokens that are diverse, and relevant to the text.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", NeurIPS 2025, arXiv 2506.10967.

Shape suffixes: B batch, I image tokens, T text tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.greedy import cosines, determinantal
from pumer.reducers.ops.matching import unit_vectors
from pumer.reducers.ops.saliency import question_words
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, candidates, image_states
from pumer.reducers.tokens import Tokens

WORDS_AT_ONCE = 1024
"""Words of a prompt that are held in double precision at a time."""


@register
@dataclass(frozen=True)
class CDPruner(Selector):
    """Greedy inference of a determinantal point process: diverse and relevant tokens.

    Relevance is the mean cosine with the embeddings of the question, as in the paper for models
    without a CLIP text tower; without text only diversity counts. The published code for LLaVA
    compares CLIP's embeddings of patches and prompt, for which it loads CLIP's text tower. The
    budget is per crop of an image.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        theta: weight of relevance against diversity in (0, 1); None, the published default, uses
            relevance unweighted.
        inverted: treat the least similar tokens as the most relevant, as published for CLIP's
            towers, where relevant patches are less similar to the text.

    Example:
        >>> llava = pumer.apply(llava, pumer.CDPruner(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "cdpruner"
    theta: float | None = None
    inverted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 < self.theta < 1:
            raise ValueError(f"theta lies between 0 and 1, not {self.theta}")

    @property
    def traits(self) -> Traits:
        return Traits(per_crop=True, needs_text=True)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI, image_BID = candidates(tokens), image_states(tokens)
        assert tokens.states_BND is not None
        text_BD = mean_direction(tokens.states_BND[:, : tokens.text], question_words(tokens))
        weight_BI = self.weights(image_BID, text_BD, valid_BI)
        kernel_BII = cosines(image_BID) * weight_BI[:, :, None] * weight_BI[:, None]
        return determinantal(kernel_BII, valid_BI, num_keep_B, most)

    def weights(self, image_BID: Tensor, text_BD: Tensor, valid_BI: Tensor) -> Tensor:
        """How relevant each image token is to the text, float64 [B,I], 0 at padding.

        Args:
            image_BID: image tokens where they can be compared with words.
            text_BD: mean direction of the words.
            valid_BI: bool, false at padding.
        """
        similarity_BI = (unit_vectors(image_BID, torch.float64) @ text_BD[..., None])[..., 0]
        similarity_BI = similarity_BI * (-1 if self.inverted else 1)
        low_B1 = similarity_BI.masked_fill(~valid_BI, torch.inf).amin(1, keepdim=True)
        high_B1 = similarity_BI.masked_fill(~valid_BI, -torch.inf).amax(1, keepdim=True)
        weight_BI = (similarity_BI - low_B1 + 1e-6) / (high_B1 - low_B1).clamp_min(1e-6)
        if self.theta is not None:
            # Less the largest: what multiplies all weights changes no choice, and exp overflows.
            largest_B1 = weight_BI.masked_fill(~valid_BI, -torch.inf).amax(1, keepdim=True)
            weight_BI = (self.theta / (2 * (1 - self.theta)) * (weight_BI - largest_B1)).exp()
        return torch.where(valid_BI, weight_BI, 0.0)


def mean_direction(text_BTD: Tensor, words_BT: Tensor) -> Tensor:
    """Mean of the words, each at length 1, float64 [B,D]; zero without words.

    The mean cosine with all words is the product with this: no tensor is words x patches.

    Args:
        text_BTD: embeddings; a word that is not finite counts as zero.
        words_BT: bool, false at padding.
    """
    total_BD = text_BTD.new_zeros(text_BTD.shape[0], text_BTD.shape[2], dtype=torch.float64)
    for start in range(0, text_BTD.shape[1], WORDS_AT_ONCE):
        part = slice(start, start + WORDS_AT_ONCE)
        part_BTD = text_BTD[:, part]
        real_BT1 = (words_BT[:, part] & part_BTD.isfinite().all(2))[..., None]
        unit_BTD = unit_vectors(torch.where(real_BT1, part_BTD, 0.0), torch.float64)
        total_BD = total_BD + unit_BTD.sum(1)
    return total_BD / words_BT.sum(1, keepdim=True).clamp_min(1)
