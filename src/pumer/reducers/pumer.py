"""PuMer: text-informed pruning and modality-aware merging.

Cao, Paranjape, Hajishirzi, "PuMer: Pruning and Merging Tokens for Efficient Vision Language
Models", ACL 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pumer.reducers import official
from pumer.reducers.base import ModelShape, Reducer, Traits, check_layers, check_ratios
from pumer.reducers.ops.budget import (
    Count,
    halves,
    merged_of,
    portion,
    prune_then_merge,
    smaller,
    stage_layers,
)
from pumer.reducers.ops.matching import bipartite, rank
from pumer.reducers.ops.saliency import SCORES, text_saliency
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import Tokens, TokenShape

SMALLEST = 1e-6
"""Least weight in an average, for tokens that the text hardly looks at."""


def _shares(ratios: float | tuple[float, ...]) -> tuple[float, ...]:
    """One share for all layers, or one for each."""
    return ratios if isinstance(ratios, tuple) else (ratios,)


@register
@dataclass(frozen=True)
class PuMer(Reducer):
    """Prune image tokens that the text does not attend to, then merge similar image tokens and
    similar text tokens.

    Ratios are of the real (unpadded) tokens of a modality at each reducing layer, without [CLS],
    rounded half to even; at least one image token stays. A decoder's prompt has no [CLS]: there the
    first and the last token of the text stay.

    Args:
        prune: share of the image tokens to prune, those that the text attends to least; a tuple has
            one share for each of `layers`.
        merge: share of the image tokens (before pruning) to merge away; a tuple as for `prune`.
        merge_text: share of the text tokens to merge away.
        layers: layers that reduce, counted from 0, between their attention and their MLP; in a
            decoder after both. None: after one, two and three quarters of the model's layers, the
            paper's (2, 5, 8) of 12. "all": every layer, only with `official`.
        score: how the text scores an image token, one of `ops.saliency.SCORES`.
        official: reproduce the published code bug for bug (see `reducers.official`), for released
            checkpoints; needs `layers`. True: as published for the model at hand; "meter": as
            published for METER. In ViLT, `merge` >= 1 with `prune` 0 is a number of tokens, and
            text and image are matched together.
        style: published merging variant, "tome", "tip" or "diff"; only with `official`.

    Options beyond the paper, without `official`:

    Args:
        proportional: attention counts a merged token as often as its size says, as in ToMe.
        protect: share of the remaining image tokens, those that the text attends to most, that are
            merged away only after all others. Others may still be merged into them.
        weighted: a merged token is the average weighted by sizes and saliency, so that what the
            text looks at is not averaged away.
        smooth: share that the saliency of the layers that reduced before has in a token's saliency;
            a merged token has the sum of its members'. Only with attention as `score`.
        prune_below: prune only tokens whose saliency is below this share of the mean over the
            image; `prune` then is the most that goes. How many stay depends on the sample.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.PuMer(prune=0.1, merge=0.3))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (21, 32)
    """

    name = "pumer"
    added = ("proportional", "protect", "weighted", "smooth", "prune_below")
    prune: float | tuple[float, ...] = 0.1
    merge: float | tuple[float, ...] = 0.3
    merge_text: float = 0.2
    layers: tuple[int, ...] | Literal["all"] | None = None  # type: ignore[assignment]
    score: str = "mean_head"
    official: bool | Literal["meter"] = False
    style: str = "tome"
    proportional: bool = False
    protect: float = 0.0
    weighted: bool = False
    smooth: float = 0.0
    prune_below: float = 0.0

    def __post_init__(self) -> None:
        if self.official not in (False, True, "meter"):
            raise ValueError(f"official is False, True or 'meter', not {self.official!r}")
        self._check_ratios()
        if self.layers is None and self.official:
            raise ValueError(
                "official=True needs `layers`: for example (2, 5, 8), or 'all' for every layer"
            )
        if isinstance(self.layers, str) and not (self.layers == "all" and self.official):
            raise ValueError(
                "layers are numbers such as (2, 5, 8), or 'all' with official=True, not "
                f"{self.layers!r}"
            )
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, not {self.score!r}")
        if self.style not in official.STYLES or (self.style != "tome" and not self.official):
            raise ValueError(
                f"style is one of {', '.join(official.STYLES)}, and only 'tome' without "
                "official=True"
            )
        if isinstance(self.layers, (tuple, list)):
            object.__setattr__(self, "layers", check_layers(self.layers))
            if min(self.layers, default=0) < 0:
                raise ValueError("PuMer scores by attention, so it cannot act before layer 0")
        self._check_options()

    def _check_ratios(self) -> None:
        shares = {"prune": _shares(self.prune), "merge": _shares(self.merge)}
        counted = self.official and self.prune == 0
        for name, ratios in shares.items():
            for ratio in ratios:
                check_ratios(**{name: 0 if name == "merge" and counted and ratio >= 1 else ratio})
        check_ratios(merge_text=self.merge_text)
        # One share stands for as many layers as the other setting names.
        stages = max(len(ratios) for ratios in shares.values())
        prune, merge = (r * stages if len(r) == 1 else r for r in shares.values())
        for pruned, merged in zip(prune, merge, strict=False):
            if pruned + merged >= 1 and not self.official:
                raise ValueError(
                    f"prune {pruned} + merge {merged} leaves no image token: give less than 1 in "
                    "all"
                )

    def _check_options(self) -> None:
        check_ratios(protect=self.protect, smooth=self.smooth, prune_below=self.prune_below)
        if self.smooth and not self.score.endswith("head"):
            raise ValueError(
                f"smooth averages shares of attention, which score={self.score!r} is not: give "
                "score='mean_head' or 'first_head'"
            )
        schedules = [r for r in (self.prune, self.merge) if isinstance(r, tuple)]
        if self.official:
            options = [name for name in self.added if getattr(self, name)]
            if options or schedules:
                raise ValueError(
                    "the published code has one share for all layers and no further options: "
                    f"official=True goes without {', '.join(options) or 'a tuple of shares'}"
                )
        if self.layers is not None and any(len(r) != len(self.layers) for r in schedules):
            raise ValueError(
                f"prune and merge have one share for all layers, or one for each of the "
                f"{len(self.layers)} layers {self.layers}"
            )
        if len({len(ratios) for ratios in schedules}) > 1:
            raise ValueError("prune and merge have a different number of shares: give as many")

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_attention=bool(self.official),
            needs_text=True,
            official=bool(self.official),
            proportional_attention=self.proportional,
            dynamic_length=self.prune_below > 0,
        )

    def resolve(self, model: ModelShape) -> Self:
        if self.official:
            return self._resolve_official(model)
        if self.layers is not None:
            return self
        # A decoder may be too shallow for three reductions.
        stages = max(len(_shares(self.prune)), len(_shares(self.merge)))
        stages = stages if stages > 1 else min(3, model.last + 1)
        return replace(self, layers=stage_layers(stages, model.depth, model.last))

    def _resolve_official(self, model: ModelShape) -> Self:
        """`official=True` becomes "meter" where text and image have a separate cross-attention."""
        if model.co_attention and self.layers == "all":
            raise ValueError(
                "METER's published reducer needs `layers`, for example layers=(0, 1, 2, 3)"
            )
        if self.official == "meter" and model.co_attention is False:
            raise ValueError(
                "official='meter' is METER's published reducer: give ViLT official=True"
            )
        return replace(self, official="meter") if model.co_attention else self

    def reduces_at(self, layer: int) -> bool:
        return layer >= 0 if self.layers == "all" else super().reduces_at(layer)

    def check(self, depth: int) -> None:
        if self.layers != "all":
            super().check(depth)

    @classmethod
    def upgraded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """`layers` is null in files for every layer, as in the published configurations."""
        every = settings.get("official") and "layers" in settings and settings["layers"] is None
        return settings | ({"layers": "all"} if every else {})

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({"layers": None} if self.layers == "all" else {})

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not self.reduces_at(shape.layer):
            return shape.unchanged
        text, (prune, merge) = shape.text, self._ratios(shape.layer)
        if self.official == "meter":
            return official.lengths_meter(text, shape.image, prune, merge, self.merge_text)
        if self.official:
            return official.lengths(text, shape.image, prune, merge, self.merge_text, self.style)
        kept, merged = prune_then_merge(shape.patches, prune, merge)
        if self.prune_below:  # the most that any sample keeps
            kept = shape.patches
        mergeable = max(text - (shape.num_prefix_tokens or 2), 0)
        return text - self._merged_text(mergeable), shape.structure + kept - merged

    def plan(self, tokens: Tokens) -> Plan:
        prune, merge = self._ratios(tokens.layer)
        if self.official == "meter":
            return official.plan_meter(tokens, prune, merge, self.merge_text)
        if self.official:
            return official.plan(tokens, prune, merge, self.merge_text, self.score, self.style)
        num_prefix_tokens, keys_BNC = tokens.num_prefix_tokens, tokens.mean_keys_BNC
        image = slice(tokens.text + num_prefix_tokens, keys_BNC.shape[1])
        text_slots, image_slots = self.lengths(tokens.shape)
        slots = max(image_slots - num_prefix_tokens, 0)

        valid_BI = tokens.valid_BN[:, image]
        saliency_BI = valid_BI.float()
        if prune or self.protect or self.weighted or self.smooth:
            saliency_BI = text_saliency(tokens, self.score)[:, num_prefix_tokens:]
            saliency_BI = saliency_BI.masked_fill(~valid_BI, 0)
        if self.smooth:
            saliency_BI = self._smoothed(saliency_BI, tokens)

        # Text-informed image pruning: the least attended image tokens go; the order stays.
        kept_B, merged_B = prune_then_merge(valid_BI.sum(1), prune, merge)
        reduction = Plan.identity(valid_BI)
        if prune:
            rank_BI = rank(saliency_BI.masked_fill(~valid_BI, -torch.inf))
            keep_BI = rank_BI < kept_B[:, None]
            most_kept, _ = prune_then_merge(valid_BI.shape[1], prune, merge)
            if self.prune_below:
                total_B1 = saliency_BI.sum(1, keepdim=True)
                mean_B1 = total_B1 / valid_BI.sum(1, keepdim=True).clamp_min(1)
                keep_BI = valid_BI & (keep_BI | (saliency_BI >= self.prune_below * mean_B1))
                most_kept = valid_BI.shape[1]
                merged_B = merged_of(keep_BI.sum(1), valid_BI.sum(1), prune, merge)
            reduction = Plan.keep(valid_BI & keep_BI, most_kept)

        # Modality-aware merging: the remaining image tokens with each other, then the text.
        if merge:
            sizes_BI = tokens.sizes_BN[:, image]
            if self.weighted:
                # Shares of the text's attention to the image; other scores may be negative.
                attended_BI = saliency_BI.clamp_min(0)
                share_BI = (attended_BI / attended_BI.sum(1, keepdim=True)).nan_to_num(0)
                sizes_BI = sizes_BI * share_BI.clamp_min(SMALLEST)
            protected_BI = None
            if self.protect:
                remaining_BI = reduction.reduce(saliency_BI).masked_fill(
                    ~reduction.mask_BK, -torch.inf
                )
                limit_B = portion(self.protect, reduction.mask_BK.sum(1))
                protected_BI = rank(remaining_BI) < limit_B[:, None]
            merging = bipartite(
                reduction.reduce(keys_BNC[:, image]),
                reduction.mask_BK,
                merged_B,
                slots,
                reduction.reduce(sizes_BI),
                last_BN=protected_BI,
            )
            reduction = reduction.then(merging)
        text = None
        if self.merge_text:
            text = (self._merge_text if num_prefix_tokens else self._merge_between)(
                tokens, keys_BNC, text_slots
            )
        plan = tokens.with_structure(text, reduction)
        if not self.smooth:
            return plan
        return replace(plan, carried_BN=nn.functional.pad(saliency_BI, (image.start, 0)))

    def _smoothed(self, saliency_BI: Tensor, tokens: Tokens) -> Tensor:
        """Shares of the text's attention, averaged with what earlier layers carry on."""
        share_BI = saliency_BI / saliency_BI.sum(1, keepdim=True).clamp_min(SMALLEST)
        if tokens.carried_BN is None:
            return share_BI
        before_BI = tokens.carried_BN[:, tokens.text + tokens.num_prefix_tokens :]
        return self.smooth * before_BI + (1 - self.smooth) * share_BI

    def _ratios(self, layer: int) -> tuple[float, float]:
        """The shares to prune and to merge in a layer that reduces."""
        at = self.layers.index(layer) if isinstance(self.layers, tuple) else 0
        prune, merge = (_shares(ratios) for ratios in (self.prune, self.merge))
        return prune[at % len(prune)], merge[at % len(merge)]

    def _merge_text(self, tokens: Tokens, keys_BNC: Tensor, slots: int) -> Plan:
        text = slice(tokens.num_prefix_tokens, tokens.text)
        slots = max(slots - tokens.num_prefix_tokens, 0)
        return self._merge(tokens, keys_BNC, text, tokens.valid_BN[:, text], slots)

    def _merge(
        self, tokens: Tokens, keys_BNC: Tensor, text: slice, valid_BT: Tensor, slots: int
    ) -> Plan:
        merged_B = self._merged_text(valid_BT.sum(1))
        return bipartite(keys_BNC[:, text], valid_BT, merged_B, slots, tokens.sizes_BN[:, text])

    def _merge_between(self, tokens: Tokens, keys_BNC: Tensor, slots: int) -> Plan:
        """Merge the text between its first and its last real token, which stay."""
        valid_BT = tokens.valid_BN[:, : tokens.text]
        first = Plan.identity(valid_BT[:, :1])
        if slots < 3:
            return Plan.identity(valid_BT)
        count_B1 = valid_BT.sum(1, keepdim=True)
        places = torch.arange(1, tokens.text, device=valid_BT.device)
        between = self._merge(
            tokens, keys_BNC, slice(1, tokens.text), places < count_B1 - 1, slots - 2
        )
        # The last token directly follows the merged ones, so a shorter row has no gap before it.
        last_BT = places == count_B1 - 1
        filled_B1 = between.mask_BK.sum(1, keepdim=True)
        behind = Plan(
            torch.where(last_BT, filled_B1, between.slot_BN),
            between.weight_BN.masked_fill(last_BT, 1.0),
            places[: slots - 1] <= filled_B1 + last_BT.any(1, keepdim=True),
        )
        return Plan.side_by_side([first, behind])

    def _merged_text(self, count: Count) -> Count:
        return smaller(portion(self.merge_text, count), halves(count))
