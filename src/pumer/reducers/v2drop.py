"""V2Drop: prune image tokens that a layer of the language model hardly changes.

Chen et al., "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models", CVPR
2026, arXiv 2509.01552.

Shape suffixes: B batch, N tokens, I image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Traits, check_layers
from pumer.reducers.ops.budget import Count, larger, num_keep, smaller, spread, stage_layers
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates
from pumer.reducers.tokens import Tokens

PUBLISHED = (3 / 32, 17 / 32, 22 / 32)
"""Share of LLaVA-1.5-7B's layers before each of the three stages."""


@register
@dataclass(frozen=True)
class V2Drop(Selector):
    """At every stage, keep the image tokens whose states a layer of the language model changes
    most.

    The change is the norm of the difference between output and input of the layer. Neither queries
    nor keys are captured, so any attention kernel can be used. The published layers 3, 17 and 22
    are the first with fewer tokens: it acts after 2, 16 and 21.

    Args:
        keep: tokens kept at each stage: shares of the tokens that are left, rounded down, or
            numbers. At least one stays, also at 0.0. Published for Qwen2-VL: (0.25, 0.05, 0.0).
        layers: the layers after which it acts, counted from 0, one for each number. None: for three
            stages the published ones, relative to the depth; otherwise the ends of all stages but
            the last, of equal length.

    Example:
        >>> llava = pumer.apply(llava, pumer.V2Drop(keep=(0.5, 0.25), layers=(0, 1)))
        >>> [image for _, image in pumer.report(llava).lengths]  # before and after every layer
        [16, 8, 2, 2, 2]
    """

    name = "v2drop"
    keep: tuple[float | int, ...] = (0.5, 0.5, 0.0)  # type: ignore[assignment]
    layers: tuple[int, ...] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.keep, tuple) or not self.keep:
            raise ValueError(
                f"keep is one number for each layer, such as (0.5, 0.5, 0.0), not {self.keep!r}"
            )
        for stage, keep in enumerate(self.keep):
            is_share = isinstance(keep, float) and 0 <= keep <= 1
            if not (is_share or (type(keep) is int and keep >= 1)):
                raise ValueError(
                    f"keep[{stage}] is a share from 0.0 to 1.0 or a whole number of tokens from 1, "
                    f"not {keep!r}"
                )
        if self.layers is None:
            return
        if len(self.keep) != len(self.layers) or self.layers != check_layers(self.layers):
            raise ValueError(
                f"give one number to keep for each layer, in order, not {self.keep} for layers "
                f"{self.layers}"
            )
        if min(self.layers) < 0:
            raise ValueError("a layer's change scores the tokens, so it cannot act before layer 0")

    def resolve(self, model: ModelShape) -> Self:
        if self.layers is not None:
            return self
        if len(self.keep) == len(PUBLISHED):
            return replace(self, layers=spread(PUBLISHED, model.depth, model.last))
        return replace(self, layers=stage_layers(len(self.keep), model.depth, model.last))

    @property
    def traits(self) -> Traits:
        return Traits(needs_qk=False, needs_input=True)

    def budget(self, count: Count, layer: int) -> Count:
        assert self.layers is not None
        keep = self.keep[self.layers.index(layer)]
        if isinstance(keep, int):
            return num_keep(keep, count)
        share = (count.double() * keep).long() if isinstance(count, Tensor) else int(count * keep)
        return larger(share, smaller(count, 1))

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return best(change(tokens), candidates(tokens), num_keep_B)


def change(tokens: Tokens) -> Tensor:
    """Norm of the change of every image token by the layer, float64 [B,I]; values that are not
    finite count as unchanged."""
    if tokens.states_BND is None or tokens.input_BND is None:
        raise ValueError(
            "v2drop compares the input and the output of a layer of a language model, and there "
            "are none here"
        )
    first = tokens.text + tokens.num_prefix_tokens
    moved_BID = tokens.states_BND[:, first:].double() - tokens.input_BND[:, first:].double()
    finite_BID = candidates(tokens)[..., None] & moved_BID.isfinite()
    length_BI: Tensor = torch.where(finite_BID, moved_BID, 0.0).norm(dim=-1)
    return length_BI
