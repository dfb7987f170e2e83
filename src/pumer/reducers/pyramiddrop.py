"""PyramidDrop: fewer image tokens from stage to stage of the language model.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", CVPR 2025, arXiv 2410.17247.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Traits, check_layers
from pumer.reducers.ops.budget import Count, check_keep, num_keep, smaller, stage_layers
from pumer.reducers.ops.saliency import last_text_attention
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, best, candidates
from pumer.reducers.tokens import Tokens


@register
@dataclass(frozen=True)
class PyramidDrop(Selector):
    """At the end of every stage, keep the image tokens that the last text token attends to most.

    The paper's layers 8, 16 and 24 are the first with fewer tokens: it acts after 7, 15 and 23.
    Attention is that of the layer it acts after; the published code uses the next layer's.

    Shares are of the image tokens before the first stage, rounded down: of 575 tokens 287, 143 and
    71 are left. A later stage infers that number as the smallest one that leaves what it receives.
    If several do, it may keep one token less than the published code, which remembers the number;
    never if every stage halves.

    Args:
        keep: tokens left after each stage: shares of the image's tokens, or numbers; never rising.
            A single share (float) is the paper's lambda, applied at every stage to what is left.
        layers: the layers after which it acts, counted from 0, one for each number. None: the ends
            of all stages but the last, of equal length; three with a single share.

    Example:
        >>> llava = pumer.apply(llava, pumer.PyramidDrop(keep=(0.5, 0.25), layers=(0, 1)))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "pyramiddrop"
    keep: float | tuple[float | int, ...] = 0.5  # type: ignore[assignment]
    layers: tuple[int, ...] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if isinstance(self.keep, float):
            check_keep(keep=self.keep)
            if self.layers is None:
                return
            shares = tuple(self.keep ** (stage + 1) for stage in range(len(self.layers)))
            object.__setattr__(self, "keep", shares)
        check_stages(self.keep, self.layers)
        assert isinstance(self.keep, tuple)
        if len({type(keep) for keep in self.keep}) > 1 or any(
            a < b for a, b in pairwise(self.keep)
        ):
            raise ValueError(
                f"keep is all shares or all whole numbers, never rising, not {self.keep}"
            )

    def resolve(self, model: ModelShape) -> Self:
        if self.layers is not None:
            return self
        stages = len(self.keep) if isinstance(self.keep, tuple) else min(3, model.last + 1)
        return replace(self, layers=stage_layers(stages, model.depth, model.last))

    @property
    def traits(self) -> Traits:
        return Traits(needs_text=True)

    def budget(self, count: Count, layer: int) -> Count:
        assert isinstance(self.keep, tuple)
        assert self.layers is not None
        stage = self.layers.index(layer)
        keep = self.keep[stage]
        if isinstance(keep, int):
            return num_keep(keep, count)
        before = self.keep[stage - 1] if stage else 1.0
        return smaller(_share(count, before, keep), count)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        return best(
            last_text_attention(tokens)[:, tokens.num_prefix_tokens :],
            candidates(tokens),
            num_keep_B,
        )


def _share(count: Count, before: float, keep: float) -> Count:
    """`keep` times the smallest number of tokens of which `before` times is `count`, at least one.

    Both products are rounded down.
    """
    if isinstance(count, Tensor):
        fewest = torch.ceil(count.double() / before)
        fewest = fewest + ((fewest * before).long() < count)
        return (fewest * keep).long().clamp_min(1)
    fewest = math.ceil(count / before)
    fewest += int(fewest * before) < count
    return max(1, int(fewest * keep))


def check_stages(keep: float | tuple[float | int, ...], layers: tuple[int, ...] | None) -> None:
    """Raise ValueError unless there is one budget per layer, and layers rise from 0.

    Layers that are None fit any number of budgets.
    """
    if not isinstance(keep, tuple):
        raise ValueError(f"keep is one number for each layer, such as (0.5, 0.25), not {keep!r}")
    if layers is not None and (len(keep) != len(layers) or layers != check_layers(layers)):
        raise ValueError(
            f"give one number to keep for each layer, in order, not {keep} for layers {layers}"
        )
    check_keep(**{f"keep[{stage}]": share for stage, share in enumerate(keep)})
    if min(layers or (0,)) < 0:
        raise ValueError("attention scores the tokens, so it cannot act before layer 0")
