"""DynamicViT: prune image tokens by the scores of a small trained predictor.

Rao, Zhao, Liu, Lu, Zhou, Hsieh, "DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification", NeurIPS 2021; and the port of it to ViLT and METER in the published PuMer code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from pumer.reducers.base import ModelShape, Traits, check_layers
from pumer.reducers.learned import KeepDecision, Learned, decide, mean_of
from pumer.reducers.ops.budget import Count, stage, stage_layers
from pumer.reducers.ops.matching import rank
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import Tokens, TokenShape


@register
@dataclass(frozen=True)
class DynamicViT(Learned):
    """Keep the fixed share of image tokens that a trained predictor scores highest, after some
    layers.

    After the s-th of these layers, `int(n * keep**s)` of the n image tokens stay that entered the
    first layer.

    Args:
        keep: share of the image tokens, without [CLS], that stay at each reducing layer.
        layers: layers after which tokens go, counted from 0; the paper's 3, 6, 9 (before) are 2, 5,
            8 of 12. None: these, and layers as deep in any other model.
        weight: of the loss that holds the share of kept tokens at `keep`. Of the paper's other two
            losses, distillation is the training's, with a teacher; the one on token states is not
            implemented.
        official: the port in the published PuMer code: predictors without the global half, a count
            that includes [CLS], tokens ordered by score, and the published softmax, which padding
            contributes to. Training does not use that softmax, so with padding its logits differ in
            the third digit.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.DynamicViT(keep=0.7))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 50)
    """

    name = "dynamicvit"
    keep: float = 0.7
    layers: tuple[int, ...] | None = None  # type: ignore[assignment]
    weight: float = 2.0
    official: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share above 0 and up to 1, not {self.keep}")
        if self.layers is None:
            return
        object.__setattr__(self, "layers", check_layers(self.layers))
        if min(self.layers, default=0) < 0:
            raise ValueError("DynamicViT prunes after layers, which are counted from 0")

    def resolve(self, model: ModelShape) -> Self:
        stages = min(3, model.last + 1)
        return (
            self
            if self.layers is not None
            else replace(self, layers=stage_layers(stages, model.depth, model.last))
        )

    @property
    def traits(self) -> Traits:
        return replace(super().traits, official=self.official, post_layer=True)

    def parts(self, width: int, heads: int, depth: int, has_cross_attention: bool) -> nn.ModuleDict:
        assert self.layers is not None
        return nn.ModuleDict(
            {str(layer): Predictor(width, whole=not self.official) for layer in self.layers}
        )

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not self.reduces_at(shape.layer):
            return shape.unchanged
        # A share of the image tokens that entered; the first stage's share if that is unknown.
        entered, stage_index = shape.patches, 1
        if shape.entered is not None:
            entered, stage_index = (
                max(shape.entered - shape.num_prefix_tokens, 0),
                self._stage(shape.layer),
            )
        num_keep = self._kept(entered, shape.patches, stage_index)
        return shape.text, shape.structure + num_keep

    def plan(self, tokens: Tokens) -> Plan:
        # Scores of the image tokens, and how many of those that entered to keep.
        valid_BN = tokens.valid_BN[:, tokens.text + tokens.num_prefix_tokens :]
        score_BN = self._logits(tokens)[..., 0].masked_fill(~valid_BN, -torch.inf)
        entered_BN, stage_index = valid_BN, 1
        if tokens.entered_BI is not None:
            entered_BN, stage_index = tokens.entered_BI, self._stage(tokens.layer)
        most = self._kept(entered_BN.shape[1], valid_BN.shape[1], stage_index)
        if self.official:
            index_BK = score_BN.topk(most, dim=1).indices
            # The published mask is all ones, whatever was kept.
            kept = Plan.select(
                index_BK, torch.ones_like(index_BK, dtype=tokens.mask_BN.dtype), valid_BN.shape[1]
            )
            return tokens.with_structure(None, kept)
        num_keep_B = self._kept(entered_BN.sum(1), valid_BN.sum(1), stage_index)
        keep_BN = valid_BN & (rank(score_BN) < num_keep_B[:, None])
        return tokens.with_structure(None, Plan.keep(keep_BN, most))

    def gate(self, tokens: Tokens) -> KeepDecision:
        """Decisions on the image tokens that are still there; [CLS] and text stay."""
        first = tokens.text + tokens.num_prefix_tokens
        valid_BN = tokens.valid_BN[:, first:]
        before = tokens.mask_BN.float() if tokens.gate_BN is None else tokens.gate_BN
        image_BN = (
            decide(self._logits(tokens), self.sampling_at(tokens.progress)) * before[:, first:]
        )
        return KeepDecision(
            torch.cat([before[:, :first], image_BN], dim=1), mean_of(image_BN, valid_BN)
        )

    def budget_loss(
        self, keep_ratios: Sequence[Tensor], progress: float, heads: Sequence[Tensor] = ()
    ) -> Tensor:
        """Squared distance of every sample's share of kept tokens from `keep`, `keep`^2, ...
        (equation 14)."""
        stages = [
            (keep_ratio_B - self.keep**stage_index).square().mean()
            for stage_index, keep_ratio_B in enumerate(keep_ratios, start=1)
        ]
        return self.weight * torch.stack(stages).mean()

    def _logits(self, tokens: Tokens) -> Tensor:
        """Log-probabilities of (keep, drop) of the image tokens without [CLS]."""
        assert tokens.states_BND is not None
        assert tokens.part is not None
        first = tokens.text + tokens.num_prefix_tokens
        there_BN = tokens.valid_BN if tokens.gate_BN is None else tokens.gate_BN
        # Padding may be NaN, and 0 * NaN is NaN.
        states_BND = tokens.states_BND.masked_fill(~tokens.valid_BN[..., None], 0)
        rated: Tensor = tokens.part(states_BND[:, first:], there_BN[:, first:])
        return rated

    def _stage(self, layer: int) -> int:
        assert self.layers is not None
        return self.layers.index(layer) + 1

    def _kept(self, entered: Count, count: Count, stage_index: int) -> Count:
        if not self.official:
            return stage(self.keep, stage_index, entered, count)
        # A share of the count including [CLS], layer by layer; at most all tokens.
        if isinstance(count, int):
            return min(int((count + 1) * self.keep), count)
        return ((count + 1).double() * self.keep).long().minimum(count)


class Predictor(nn.Module):
    """Scores every image token: log-probabilities of (keep, drop).

    Args:
        width: channels of a token.
        whole: replace half of the channels by their mean over the remaining tokens, as in
            DynamicViT.
    """

    def __init__(self, width: int, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        # Numbered as in the published code.
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, states_BND: Tensor, there_BN: Tensor) -> Tensor:
        # Local features of every token; half of them become the mean over the tokens.
        embedded = self.layers[:3](states_BND)
        if self.whole:
            local, shared = embedded.chunk(2, dim=-1)
            weights = there_BN[..., None].to(shared.dtype)
            mean = (shared * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(
                1
            )
            embedded = torch.cat([local, mean.expand_as(local)], dim=-1)
        rated: Tensor = self.layers[3:](embedded)
        return rated
