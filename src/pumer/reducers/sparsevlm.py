"""SparseVLM: the words that speak of the picture rate the image tokens; the best of the dropped ones are recycled.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417.

Shape suffixes: B batch, N tokens, T text tokens, I image tokens, M recycled ones, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Grid, Reducer, Tokens
from pumer.reducers.budget import Count, kept, smaller
from pumer.reducers.clustering import density_peaks
from pumer.reducers.plan import Plan
from pumer.reducers.pyramiddrop import check_stages
from pumer.reducers.registry import register
from pumer.reducers.scores import text_saliency
from pumer.reducers.selector import best, candidates, image_states


@register
@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Keep the image tokens that the raters among the words attend to most; cluster the best of the others.

    Raters are the words that image tokens are more like than the average word. They are chosen anew at each layer, from
    its states scaled to one size; the published code chooses them once, from the embeddings.

    Args:
        keep: image tokens that stay at each layer, besides the clusters: whole numbers, or shares of those that arrive
            there. Published: (300, 200, 110) for 192 on average, (303, 110, 36) for 128, (66, 30, 17) for 64.
        layers: the layers after which it acts, counted from 0, one for each number.
        recycle: whether three tenths of the dropped tokens are clustered, ten to a cluster.
        average: make a cluster the average of its tokens, by their ratings; published is their sum.
    """

    name = "sparsevlm"
    keep: tuple[float | int, ...] = (300, 200, 110)
    layers: tuple[int, ...] = (2, 6, 15)
    recycle: bool = True
    average: bool = False

    def __post_init__(self) -> None:
        check_stages(self.keep, self.layers)

    def lengths(self, text: int, image: int, layer: int, prefix: int = 1, grid: Grid | None = None) -> tuple[int, int]:
        if layer not in self.layers:
            return text, image
        chosen, recycled = self._budget(image - prefix, layer)
        return text, prefix + chosen + self._clusters(recycled)

    def _budget(self, count: Count, layer: int) -> tuple[Count, Count]:
        """(kept, recycled) of `count` image tokens."""
        chosen = kept(self.keep[self.layers.index(layer)], count)
        return chosen, smaller((count - chosen) * 3 // 10 + 1, count - chosen) if self.recycle else count * 0

    @staticmethod
    def _clusters(recycled: Count) -> Count:
        return smaller(recycled // 10 + 1, recycled)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        kept_B, recycled_B = self._budget(valid_BI.sum(1), tokens.layer)
        most_kept, most = self._budget(valid_BI.shape[1], tokens.layer)
        score_BI = text_saliency(tokens, rows_BT=raters(tokens))[:, tokens.prefix :]
        chosen_BI = best(score_BI, valid_BI, kept_B)
        if most == 0:
            return tokens.with_structure(None, Plan.keep(chosen_BI, most_kept))

        recycled_BI = best(score_BI, valid_BI & ~chosen_BI, recycled_B)
        gather = Plan.keep(recycled_BI, most)
        assert gather.index_BK is not None
        centre_BM, nearest_BM = density_peaks(
            gather.reduce(image_states(tokens)), gather.mask_BK, self._clusters(recycled_B)
        )
        # Back from the list of the recycled to the image: which are centres, and who belongs to which.
        centre_BI = recycled_BI & gather.expand(centre_BM)
        home_BI = gather.expand(gather.index_BK.gather(1, nearest_BM))
        keeping = Plan.keep(chosen_BI | centre_BI, most_kept + self._clusters(most))
        slot_BI = torch.where(recycled_BI, keeping.slot_BN.gather(1, home_BI), keeping.slot_BN)
        if self.average:
            weight_BI = torch.where(recycled_BI, score_BI.clamp_min(1e-12), 1.0)
            return tokens.with_structure(None, Plan.merge(slot_BI, keeping.mask_BK, weight_BI))
        return tokens.with_structure(None, Plan(slot_BI, torch.ones_like(score_BI), keeping.mask_BK))


def raters(tokens: Tokens) -> Tensor:
    """The words that image tokens are more like than the average word, bool [B,T]; all words where none stands out.

    Likeness is a softmax over the words of the product of states of one size, averaged over the image.
    """
    words_BT, valid_BI, image_BID = tokens.valid_BN[:, : tokens.text], candidates(tokens), image_states(tokens)
    assert tokens.states_BND is not None
    text_BTD = torch.nn.functional.normalize(tokens.states_BND[:, : tokens.text].float(), dim=-1)
    root = image_BID.shape[2] ** 0.5
    logits_BIT = root * torch.nn.functional.normalize(image_BID, dim=-1) @ text_BTD.transpose(1, 2)
    likeness_BIT = logits_BIT.masked_fill(~words_BT[:, None], torch.finfo(torch.float32).min).softmax(2)
    mean_BT = (likeness_BIT * valid_BI[..., None]).sum(1) / valid_BI.sum(1, keepdim=True).clamp_min(1)
    above_BT = words_BT & (mean_BT > 1 / words_BT.sum(1, keepdim=True).clamp_min(1))
    return torch.where(above_BT.any(1, keepdim=True), above_BT, words_BT)
