"""FoPru: focal pruning.

Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", 2024, arXiv
2411.14164. No code was published. Reconstructed from its abstract and introduction, and from a
review for `saliency="variance"`: what fills the last row is our reading.

Shape suffixes: B batch, I image tokens, R rows of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.budget import portion
from pumer.reducers.ops.matching import rank, rank_in_groups
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.selector import SALIENCY, Selector, best, candidates, encoded
from pumer.reducers.tokens import Tokens, TokenShape

STRATEGIES = ("rank", "row")
VARIANCE = "variance"


@register
@dataclass(frozen=True)
class FoPru(Selector):
    """Keep the image tokens, or rows of tokens, that the vision encoder attends to most.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        strategy: "rank" keeps single tokens; "row" keeps rows, so that a line of text stays
            complete.
        saliency: "received" attention (mean over heads and queries), that of [CLS] ("class"), or
            "variance": the mean over queries or over keys, whichever varies more between the
            image's tokens.
        fill: with "row": fill the exact budget with the best tokens of the next row. Without it,
            `keep` is a share of the rows, at least one.

    Example:
        >>> llava = pumer.apply(llava, pumer.FoPru(keep=0.25))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "fopru"
    strategy: str = "rank"
    saliency: str = "received"
    fill: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency not in (*SALIENCY, VARIANCE):
            choices = ", ".join((*SALIENCY, VARIANCE))
            raise ValueError(f"saliency is one of {choices}, not {self.saliency!r}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if self._whole_rows and isinstance(self.keep, int):
            raise ValueError(
                f"whole rows are a share of the rows: give keep=0.25, say, not {self.keep}, or "
                "fill=True"
            )

    @property
    def _whole_rows(self) -> bool:
        return self.strategy == "row" and not self.fill

    @property
    def traits(self) -> Traits:
        if self.saliency == VARIANCE:
            needs = frozenset({"received_BN", "given_BN"})
        else:
            needs = frozenset({SALIENCY[self.saliency]})
        # The rows of a batch's images differ in length.
        return Traits(
            needs_encoder=needs,
            needs_grid=self.strategy == "row",
            dynamic_length=self._whole_rows,
        )

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not (self._whole_rows and self.reduces_at(shape.layer)):
            return super().lengths(shape)
        side = round(shape.patches**0.5)
        rows, columns = shape.grid or (side, side)
        num_keep = max(1, portion(self.keep, rows)) * columns
        return shape.text, shape.structure + min(num_keep, shape.patches)

    def plan(self, tokens: Tokens) -> Plan:
        if not self._whole_rows or candidates(tokens).shape[1] == 0:
            return super().plan(tokens)
        _, slots = self.lengths(tokens.shape)
        place_BI, _, rows_B = self._rows(tokens)
        keep_BI = candidates(tokens) & (place_BI < portion(self.keep, rows_B).clamp_min(1)[:, None])
        return tokens.with_structure(None, Plan.keep(keep_BI, slots - tokens.num_prefix_tokens))

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        if self.strategy == "rank":
            return best(self._saliency(tokens), candidates(tokens), num_keep_B)
        _, order_BI, _ = self._rows(tokens)
        return candidates(tokens) & (order_BI < num_keep_B[:, None])

    def _saliency(self, tokens: Tokens) -> Tensor:
        """How much attention each token gets, [B,I]."""
        if self.saliency != VARIANCE:
            return encoded(tokens, SALIENCY[self.saliency])
        valid_BI = candidates(tokens)
        received_BI, given_BI = encoded(tokens, "received_BN"), encoded(tokens, "given_BN")
        given_varies_B = _variance(given_BI, valid_BI) > _variance(received_BI, valid_BI)
        return torch.where(given_varies_B[:, None], given_BI, received_BI)

    def _rows(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Rank of every token's row, the token's own rank when rows are in that order, and the
        number of rows of each image."""
        if tokens.grid is None or tokens.patch_BN is None:
            raise ValueError(
                'rows need all patches of the image in a grid: take strategy="rank" here'
            )
        rows, columns = tokens.grid
        valid_BI, score_BI = candidates(tokens), self._saliency(tokens)
        row_BI = torch.where(valid_BI, tokens.patch_BN[:, -valid_BI.shape[1] :] // columns, rows)
        size_BR, total_BR = (
            torch.zeros(len(row_BI), rows + 1, device=row_BI.device).scatter_add(1, row_BI, value)[
                :, :rows
            ]
            for value in (valid_BI.float(), score_BI)
        )
        mean_BR = (total_BR / size_BR.clamp_min(1)).masked_fill(size_BR == 0, -torch.inf)
        place_BI = torch.nn.functional.pad(rank(mean_BR), (0, 1), value=rows).gather(1, row_BI)
        order_BI, _ = rank_in_groups(score_BI, place_BI, rows + 1)
        return place_BI, order_BI, (size_BR > 0).sum(1)


def _variance(value_BI: Tensor, valid_BI: Tensor) -> Tensor:
    """Of the real tokens of every row, float64 [B]."""
    value_BI, count_B1 = value_BI.double(), valid_BI.sum(1, keepdim=True).clamp_min(1)
    mean_B1 = value_BI.sum(1, keepdim=True) / count_B1
    return ((value_BI - mean_B1).square() * valid_BI).sum(1) / count_B1[:, 0]
