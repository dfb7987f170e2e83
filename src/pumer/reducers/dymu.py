"""DyMU: merging by a similarity threshold, so that simple images keep fewer tokens than busy ones.

Wang et al., "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", 2025, arXiv
2504.17040. This is its dynamic merging; virtual unmerging in the language model is not implemented.

Shape suffixes: B batch, N tokens, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Reducer, Traits
from pumer.reducers.ops.budget import check_keep, halves, portion, smaller
from pumer.reducers.ops.matching import UNALIKE, absorb, partners, rank
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import Tokens, TokenShape

_UNCALIBRATED = 0.85
"""The threshold without calibration."""
_DEPTH = 12
"""Layers of the usual vision tower, where no model is known."""


@dataclass(frozen=True)
class _Merging(Reducer):
    """Merge pairs that are more similar than a threshold."""

    @property
    def traits(self) -> Traits:
        return Traits(proportional_attention=True, dynamic_length=True)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return shape.unchanged  # possibly no pair is similar enough

    def plan(self, tokens: Tokens) -> Plan:
        first = tokens.text + tokens.num_prefix_tokens
        valid_BN = tokens.valid_BN[:, first:]
        if valid_BN.shape[1] < 2:
            return Plan.identity(tokens.mask_BN)
        # The best match of every source, by cosine of the keys.
        keys_BNC, sizes_BN = tokens.mean_keys_BNC[:, first:], tokens.sizes_BN[:, first:]
        similarity_BS, partner_BS = partners(keys_BNC, valid_BN, tokens.num_prefix_tokens)
        # An odd number of tokens without [CLS] has one source too many: the least similar stays.
        paired_BS = rank(similarity_BS) < self._most(valid_BN.sum(1, keepdim=True))
        merges_BS = paired_BS & (similarity_BS > self._threshold(similarity_BS, tokens.layer))
        image = absorb(
            merges_BS, partner_BS, valid_BN, valid_BN.shape[1], sizes_BN, tokens.num_prefix_tokens
        )
        return tokens.with_structure(None, image)

    def _most(self, count_B1: Tensor) -> Tensor:
        """The most of these tokens that may be merged away in a layer."""
        return halves(count_B1)

    def _threshold(self, similarity_BS: Tensor, layer: int) -> Tensor | float:
        raise NotImplementedError


@register
@dataclass(frozen=True)
class DyMU(_Merging):
    """Merge each image token at an even position into its best match if they are similar enough, in
    every layer.

    For vision towers, with proportional attention.

    Args:
        thresholds: cosine of keys above which two tokens are merged, for every layer;
            `DyMUCalibrator` finds them. None: 0.85 in every layer.
        cap: the most tokens of an image to merge away in a layer, most similar first: a share of
            those that enter the layer (float), or a number (int). None: half of them, the most that
            one layer can merge.

    Example:
        >>> reducer = pumer.Compose(tower=pumer.DyMU(), inside=None)
        >>> llava = pumer.apply(llava, reducer)
    """

    name = "dymu"
    added = ("cap",)
    thresholds: tuple[float, ...] | None = None
    cap: float | int | None = None

    def __post_init__(self) -> None:
        if self.cap is not None:
            check_keep(cap=self.cap)
        if self.thresholds is None:
            return
        if any(not isinstance(threshold, (int, float)) for threshold in self.thresholds):
            raise ValueError(f"thresholds are numbers, one for each layer, not {self.thresholds}")
        object.__setattr__(
            self, "thresholds", tuple(float(threshold) for threshold in self.thresholds)
        )

    def resolve(self, model: ModelShape) -> Self:
        return (
            self
            if self.thresholds is not None
            else replace(self, thresholds=(_UNCALIBRATED,) * (model.last + 1))
        )

    @property
    def layers(self) -> tuple[int, ...]:
        if self.thresholds is None:
            return tuple(range(_DEPTH))
        return tuple(layer for layer, threshold in enumerate(self.thresholds) if threshold < 1)

    def _most(self, count_B1: Tensor) -> Tensor:
        most_B1 = super()._most(count_B1)
        if self.cap is None:
            return most_B1
        cap = self.cap if isinstance(self.cap, int) else portion(self.cap, count_B1)
        return smaller(most_B1, cap)

    def _threshold(self, similarity_BS: Tensor, layer: int) -> float:
        return _UNCALIBRATED if self.thresholds is None else self.thresholds[layer]


@dataclass(frozen=True)
class DyMUCalibrator(_Merging):
    """Calibration of `DyMU`: merges the `r` most similar pairs per image, on average over a batch,
    and records the threshold.

    Apply it to a model, run typical images through, then call `thresholds`.

    Args:
        r: pairs per image and layer to merge, on average over a batch.
        depth: number of layers, from the first, that merge; None: all of the model's.

    Example:
        >>> from pumer.reducers import DyMUCalibrator
        >>> calibrator = DyMUCalibrator(r=2)
        >>> llava = pumer.apply(llava, pumer.Compose(tower=calibrator, inside=None))
        >>> # run typical images through, then: pumer.DyMU(calibrator.thresholds())
    """

    name = "dymu-cutoffs"
    r: int = 8
    depth: int | None = None
    noted: dict[int, list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def resolve(self, model: ModelShape) -> Self:
        # The copy shares `noted`, so that the caller can read the thresholds from the original.
        return self if self.depth is not None else replace(self, depth=model.last + 1)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(_DEPTH if self.depth is None else self.depth))

    def _threshold(self, similarity_BS: Tensor, layer: int) -> Tensor:
        # The similarities of all pairs of the batch, the best first.
        falling = similarity_BS.flatten().sort(descending=True).values
        pairs = min(self.r * len(similarity_BS), len(falling) - 1)
        # Halfway between the last pair that is merged and the first that is not, if there is one.
        last, following = falling[max(pairs - 1, 0)], falling[pairs]
        cut = torch.where(following > UNALIKE, (last + following) / 2, last - 1e-6).clamp_min(-1)
        self.noted.setdefault(layer, []).append(cut)
        return cut

    def thresholds(self) -> tuple[float, ...]:
        """Mean threshold of every layer, for `DyMU`; raises ValueError before any image."""
        if not self.noted or (self.depth is not None and set(self.noted) != set(self.layers)):
            raise ValueError(
                "there is nothing to average: run images through the model with this reducer first"
            )
        return tuple(float(torch.stack(self.noted[layer]).mean()) for layer in sorted(self.noted))
