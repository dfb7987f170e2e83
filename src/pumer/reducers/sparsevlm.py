"""SparseVLM: words about the image rate its tokens; the best pruned tokens are recycled.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", ICML 2025, arXiv 2410.04417.

Shape suffixes: B batch, N tokens, T text tokens, I image tokens, R some of these, M recycled ones,
D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Reducer, Traits
from pumer.reducers.ops.blocks import row_blocks
from pumer.reducers.ops.budget import Count, num_keep, smaller, spread
from pumer.reducers.ops.clustering import density_peaks
from pumer.reducers.ops.matching import unit_vectors
from pumer.reducers.ops.saliency import UNSEEN, question_words, text_saliency
from pumer.reducers.plan import Plan
from pumer.reducers.pyramiddrop import check_stages
from pumer.reducers.registry import register
from pumer.reducers.selector import best, candidates, image_states
from pumer.reducers.tokens import Tokens, TokenShape

MERGES = ("mean", "sum", "rating")
"""How a cluster is merged: mean, sum, or mean weighted by ratings."""

PUBLISHED_IMAGE, PUBLISHED_KEEP = 576, (300, 200, 110)
PUBLISHED_SHARES = (0.52, 0.65, 0.54)
"""The same as shares of the tokens that reach each layer, clusters included."""
PUBLISHED_DEPTHS = (3 / 32, 7 / 32, 16 / 32)


@register
@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Keep the image tokens that the rater words attend to most; cluster the best of the others.

    Raters are the words of the question (those after the image, unless the caller marks others)
    whose embeddings are more similar to the image tokens than the average word. Without these
    embeddings, as in joint encoders, the layer's states are used, normalized. A cluster takes the
    position of its centre, because positions are kept; the published code puts clusters last.

    Args:
        keep: image tokens to keep at each layer, without the clusters: numbers, or shares of those
            that reach it. Published: (300, 200, 110) for 192 on average, (303, 110, 36) for 128,
            (66, 30, 17) for 64. None: the first of these for an image of 576 tokens, and the same
            shares for any other.
        layers: the layers after which it acts, counted from 0, one for each number. None: the
            published (2, 6, 15) of 32, and the same relative depths in other models.
        recycle: whether three tenths of the pruned tokens are clustered, ten per cluster.
        merge: how a cluster is merged, one of `MERGES`; "mean" is the published code, "sum" the
            paper's formula.

    Example:
        >>> llava = pumer.apply(llava, pumer.SparseVLM(keep=(0.5, 0.25), layers=(0, 1)))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 3)
    """

    name = "sparsevlm"
    keep: tuple[float | int, ...] | None = None
    layers: tuple[int, ...] | None = None  # type: ignore[assignment]
    recycle: bool = True
    merge: str = "mean"

    def __post_init__(self) -> None:
        check_stages(PUBLISHED_KEEP if self.keep is None else self.keep, self.layers)
        if self.merge not in MERGES:
            raise ValueError(f"merge is one of {', '.join(MERGES)}, not {self.merge!r}")

    @classmethod
    def upgraded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """`average` is the older form of `merge`: true for "rating", false for "sum"."""
        if "average" not in settings:
            return settings
        current = {name: value for name, value in settings.items() if name != "average"}
        return {"merge": "rating" if settings["average"] else "sum", **current}

    def resolve(self, model: ModelShape) -> Self:
        keep = self.keep
        if keep is None:
            keep = PUBLISHED_KEEP if model.image == PUBLISHED_IMAGE else PUBLISHED_SHARES
        layers = self.layers
        if layers is None and len(keep) != len(PUBLISHED_DEPTHS):
            raise ValueError(f"keep has {len(keep)} numbers: name as many layers")
        if layers is None:
            layers = spread(PUBLISHED_DEPTHS, model.depth, model.last)
        return replace(self, keep=keep, layers=layers)

    @property
    def traits(self) -> Traits:
        return Traits(needs_embeddings=True, needs_text=True)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not self.reduces_at(shape.layer):
            return shape.unchanged
        chosen, recycled = self._budget(shape.patches, shape.layer)
        return shape.text, shape.structure + chosen + self._clusters(recycled)

    def _budget(self, count: Count, layer: int) -> tuple[Count, Count]:
        """(kept, recycled) of `count` image tokens."""
        assert self.keep is not None
        assert self.layers is not None
        chosen = num_keep(self.keep[self.layers.index(layer)], count)
        return chosen, smaller(
            (count - chosen) * 3 // 10 + 1, count - chosen
        ) if self.recycle else count * 0

    @staticmethod
    def _clusters(recycled: Count) -> Count:
        return smaller(recycled // 10 + 1, recycled)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        num_keep_B, recycled_B = self._budget(valid_BI.sum(1), tokens.layer)
        most_kept, most = self._budget(valid_BI.shape[1], tokens.layer)
        score_BI = text_saliency(tokens, rows_BT=raters(tokens))[:, tokens.num_prefix_tokens :]
        chosen_BI = best(score_BI, valid_BI, num_keep_B)
        if most == 0:
            return tokens.with_structure(None, Plan.keep(chosen_BI, most_kept))

        # Gather the tokens to recycle [B,M], and cluster them.
        recycled_BI = best(score_BI, valid_BI & ~chosen_BI, recycled_B)
        gather = Plan.keep(recycled_BI, most)
        assert gather.index_BK is not None
        centre_BM, nearest_BM = density_peaks(
            gather.reduce(image_states(tokens)), gather.mask_BK, self._clusters(recycled_B)
        )

        # Scatter back to the image tokens [B,I]: which are centres, and the centre of each token.
        centre_BI = recycled_BI & gather.expand(centre_BM)
        home_BI = gather.expand(gather.index_BK.gather(1, nearest_BM))
        keeping = Plan.keep(chosen_BI | centre_BI, most_kept + self._clusters(most))
        slot_BI = torch.where(recycled_BI, keeping.slot_BN.gather(1, home_BI), keeping.slot_BN)
        weight_BI = torch.ones_like(score_BI)
        if self.merge == "sum":
            return tokens.with_structure(None, Plan(slot_BI, weight_BI, keeping.mask_BK))
        if self.merge == "rating":
            weight_BI = torch.where(recycled_BI, score_BI.nan_to_num(0).clamp_min(1e-12), 1.0)
        return tokens.with_structure(None, Plan.merge(slot_BI, keeping.mask_BK, weight_BI))


def raters(tokens: Tokens) -> Tensor:
    """The words of the question with above-average similarity to the image, bool [B,T].

    Similarity is a softmax over these words of dot products of embeddings, averaged over the image
    tokens. If no word stands out, all are raters.
    """
    words_BT, embeddings = question_words(tokens), tokens.embeddings
    if embeddings is not None:
        text_BTD, image_BID = embeddings.text_BTD.float(), embeddings.image_BID.float()
        valid_BI = embeddings.valid_BI
    else:
        # Norms of states differ by orders of magnitude: without scaling one word would dominate.
        assert tokens.states_BND is not None
        states_BND = unit_vectors(tokens.states_BND) * tokens.states_BND.shape[2] ** 0.25
        text_BTD = states_BND[:, : tokens.text]
        image_BID, valid_BI = (
            states_BND[:, tokens.text + tokens.num_prefix_tokens :],
            candidates(tokens),
        )
    mean_BT = _likeness(image_BID, valid_BI, text_BTD, words_BT)
    # A margin, because equal words differ in the last bit of a sum.
    above_BT = words_BT & (mean_BT * words_BT.sum(1, keepdim=True) > 1 + 1e-5)
    return torch.where(above_BT.any(1, keepdim=True), above_BT, words_BT)


def _likeness(image_BID: Tensor, valid_BI: Tensor, text_BTD: Tensor, words_BT: Tensor) -> Tensor:
    """Mean over the real image tokens of the softmax over the words, float32 [B,T]."""
    batch, text, width = text_BTD.shape
    total_BT = torch.zeros(batch, text, device=text_BTD.device)
    for rows in row_blocks(valid_BI.shape[1], batch * text, width):
        logits_BRT = image_BID[:, rows] @ text_BTD.transpose(1, 2)
        likeness_BRT = logits_BRT.masked_fill(~words_BT[:, None], UNSEEN).softmax(2)
        total_BT = total_BT + likeness_BRT.masked_fill(~valid_BI[:, rows, None], 0).sum(1)
    return total_BT / valid_BI.sum(1, keepdim=True).clamp_min(1)
