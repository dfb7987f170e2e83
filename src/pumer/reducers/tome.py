"""ToMe: token merging.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pumer.reducers.base import MAX_LAYERS, ModelShape, Reducer, Traits, check_layers
from pumer.reducers.ops.budget import halves, merge_schedule, smaller
from pumer.reducers.ops.matching import bipartite
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import Tokens, TokenShape

_PAPER = 12
"""Layers of the paper's ViTs of width 768."""


@register
@dataclass(frozen=True)
class ToMe(Reducer):
    """Merge the most similar image tokens in every layer; the text plays no part.

    Groups, averages and sizes are those of the published code. Tokens keep the order of the image;
    the published code puts the destinations last.

    Args:
        r: image tokens to merge away per layer: a number, `(number, inflection)`, or a list with
            one number per layer (`budget.merge_schedule`). At most half of a layer's tokens can go.
        depth: number of layers, from the first, that the schedule spans; None: all of the model's
            (12 as in the paper without a model).
        proportional: the paper's proportional attention, for use without training: attention
            counts a merged token as often as its size says. None: where the model supports it.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.ToMe(r=16))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 49)
    """

    name = "tome"
    r: int | tuple[int, float] | Sequence[int] = 8
    depth: int | None = None
    proportional: bool | None = None

    def __post_init__(self) -> None:
        numbers = (self.r,) if isinstance(self.r, int) else self.r
        if isinstance(numbers, str) or any(not isinstance(count, int | float) for count in numbers):
            raise ValueError(
                "r is a number of tokens to merge away per layer, or a list of them, not "
                f"{self.r!r}"
            )
        if self.depth is not None and not (
            isinstance(self.depth, int) and 0 <= self.depth <= MAX_LAYERS
        ):
            raise ValueError(
                f"depth is a number of layers from 0 to {MAX_LAYERS}, not {self.depth!r}"
            )
        if any(step < 0 for step in self.schedule):
            raise ValueError(f"ToMe merges away a number of tokens from 0, not {self.r}")

    @property
    def schedule(self) -> list[int]:
        """Tokens to merge away in every layer."""
        return merge_schedule(self.r, _PAPER if self.depth is None else self.depth)

    def resolve(self, model: ModelShape) -> Self:
        return replace(
            self,
            depth=model.last + 1 if self.depth is None else self.depth,
            proportional=model.proportional if self.proportional is None else self.proportional,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return check_layers([layer for layer, merged in enumerate(self.schedule) if merged > 0])

    @property
    def traits(self) -> Traits:
        return Traits(proportional_attention=bool(self.proportional))

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if shape.layer not in self.layers:
            return shape.unchanged
        merged = smaller(self.schedule[shape.layer], halves(shape.patches))
        return shape.text, shape.image - merged

    def plan(self, tokens: Tokens) -> Plan:
        image = slice(tokens.text + tokens.num_prefix_tokens, tokens.mask_BN.shape[1])
        count = image.stop - tokens.text
        _, length_after = self.lengths(tokens.shape)
        # As many tokens as the schedule says, the most similar pairs first.
        matching = bipartite(
            tokens.mean_keys_BNC[:, image],
            tokens.valid_BN[:, image],
            self.schedule[tokens.layer],
            length_after - min(tokens.num_prefix_tokens, count),
            tokens.sizes_BN[:, image],
            tokens.num_prefix_tokens,
        )
        return tokens.with_structure(None, matching)
