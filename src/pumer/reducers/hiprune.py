"""HiPrune: tokens that a middle and a deep layer of the vision encoder attend to.

Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
Vision-Language Models", AAAI 2026, arXiv 2508.00553.

Shape suffixes: B batch, I image tokens, A tokens around an anchor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Traits
from pumer.reducers.ops.matching import rank_in_groups
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates, encoded
from pumer.reducers.tokens import Tokens

OBJECT_SHARE = 3 / 8
"""Position of the layer that attends to objects in the encoder: 9 of CLIP's 24."""
AROUND = 5
"""An anchor and its four neighbours."""


@register
@dataclass(frozen=True)
class HiPrune(Selector):
    """Keep anchors that a middle layer of the vision encoder attends to most, their neighbours, and
    the tokens that a deep layer attends to most.

    Neighbours are the tokens before, after, above and below an anchor. As published, those before
    and after may lie in another row, and those outside the image are replaced by its first or last
    token. The budget is per crop of an image.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        alpha: share of the budget for anchors and their neighbours.
        object_layer: layer of the vision encoder, counted from 1, whose attention selects the
            anchors. None: among the layers that attend to the whole image, the one closest to
            three eighths of the depth: 9 of CLIP's 24 and 16 of Qwen2.5-VL's 32, as published.
        penalty: None: anchors and neighbours are selected once. A number: their deep attention is
            lowered by this multiple of its mean and they may be selected again, so that fewer than
            `keep` stay; 1.0 matches the published code for Qwen2.5-VL.

    Example:
        >>> llava = pumer.apply(llava, pumer.HiPrune(keep=0.5, alpha=0.3))
        >>> pumer.active(llava).reducer.object_layer  # one of two layers
        1
    """

    name = "hiprune"
    alpha: float = 0.1
    object_layer: int | None = None
    penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share from 0 to 1, not {self.alpha}")
        if self.object_layer is not None and self.object_layer < 1:
            raise ValueError(f"object_layer is counted from 1, not {self.object_layer}")
        if self.penalty is not None and self.penalty < 0:
            raise ValueError(f"penalty is a number from 0, or None, not {self.penalty}")

    def resolve(self, model: ModelShape) -> Self:
        layers = model.encoder_layers
        if not layers:  # no vision encoder: `pumer.apply` refuses it
            return self
        if self.object_layer is None:
            wanted = OBJECT_SHARE * model.encoder_depth
            # The later one of two that are equally close.
            return replace(self, object_layer=min(layers, key=lambda x: (abs(x - wanted), -x)))
        if self.object_layer not in layers:
            raise ValueError(
                "hiprune: object_layer is a layer of the vision encoder that attends to the whole "
                f"image, {', '.join(map(str, layers))}, not {self.object_layer}"
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_encoder=frozenset({"middle_received_BN", "received_BN"}),
            middle_layer=self.object_layer,
            needs_grid=True,
            per_crop=True,
            dynamic_length=self.penalty is not None,
        )

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        deep_BI = encoded(tokens, "received_BN").double()
        num_anchors_B = torch.round(num_keep_B.double() * self.alpha / AROUND).long()
        anchor_BI = best(encoded(tokens, "middle_received_BN"), valid_BI, num_anchors_B)
        around_BI = around(anchor_BI, valid_BI, _columns(tokens))

        # Anchors come first, then neighbours, then the others, each sorted by deep attention.
        tier_BI = 3 - anchor_BI.long() - around_BI.long()
        place_BI, _ = rank_in_groups(deep_BI, tier_BI.masked_fill(~valid_BI, 4), 5)
        taken_BI = valid_BI & (place_BI < num_keep_B[:, None])
        if self.penalty is None:
            return taken_BI
        around_BI = around_BI & taken_BI
        mean_B1 = deep_BI.sum(1, keepdim=True) / valid_BI.sum(1, keepdim=True).clamp_min(1)
        again_BI = deep_BI - self.penalty * mean_B1 * around_BI
        return around_BI | best(again_BI, valid_BI, num_keep_B - around_BI.sum(1))


def around(anchor_BI: Tensor, valid_BI: Tensor, columns_B: Tensor) -> Tensor:
    """The anchors and their four neighbours in raster order, bool [B,I]."""
    count = valid_BI.shape[1]
    last_B11 = (valid_BI.sum(1) - 1)[:, None, None]
    zero_B, one_B = torch.zeros_like(columns_B), torch.ones_like(columns_B)
    step_BA = torch.stack([zero_B, one_B, -one_B, columns_B, -columns_B], 1)
    target_BAI = torch.arange(count, device=valid_BI.device) + step_BA[..., None]
    # The lower bound first: without tokens, the last one has the index -1.
    target_BAI = torch.minimum(target_BAI.clamp_min(0), last_B11)
    target_BAI = torch.where(anchor_BI[:, None], target_BAI, count)
    found_BI = torch.zeros(len(valid_BI), count + 1, dtype=torch.bool, device=valid_BI.device)
    return found_BI.scatter(1, target_BAI.flatten(1), True)[:, :-1]


def _columns(tokens: Tokens) -> Tensor:
    """Patches in a row of every image, int64 [B]."""
    if tokens.grid is None or tokens.patch_BN is None:
        raise ValueError(
            "hiprune selects neighbours, so it needs all patches of an image or crop in a grid: "
            "choose another reducer for this model, such as fopru"
        )
    valid_BI = candidates(tokens)
    column_BI = tokens.patch_BN[:, tokens.mask_BN.shape[1] - valid_BI.shape[1] :] % tokens.grid[1]
    return column_BI.masked_fill(~valid_BI, 0).amax(1) + 1
