"""DART: keep the tokens that are least similar to a few pivots.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025, arXiv 2502.11494.

Shape suffixes: B batch, N tokens, T text tokens, I image tokens, P pivots, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import check_layers
from pumer.reducers.ops.matching import rank, unit_vectors
from pumer.reducers.ops.saliency import question_words
from pumer.reducers.plan import tokens_at
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, candidates, image_states
from pumer.reducers.tokens import Tokens


@register
@dataclass(frozen=True)
class DART(Selector):
    """Keep the image tokens with the largest keys as pivots, and the tokens least similar to these
    and to text pivots.

    Text pivots are words of the question: those after the image, unless the caller marks others.
    Each pivot in turn selects the same number of tokens; image pivots first, both by falling size.
    The budget includes the image pivots, and its remainder goes to the first pivots. A row without
    a pivot, because it has no text, takes one image token as pivot.

    The published code adds the image pivots to the budget and drops the remainder, takes pivots in
    the order of a Python set of their positions, and compares states after the model's final norm;
    here states are compared as the layer returns them.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        pivots: numbers of (image, text) pivots.
        layer: the layer after which it acts; published: 1. Before the first layer (-1), where there
            are no keys, the size of embeddings is used.

    Example:
        >>> llava = pumer.apply(llava, pumer.DART(keep=0.25, layer=1))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "dart"
    pivots: tuple[int, int] = (4, 4)
    layer: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers([self.layer])
        are_integers = all(isinstance(count, int) for count in self.pivots)
        if (
            len(self.pivots) != 2
            or not are_integers
            or min(self.pivots) < 0
            or sum(self.pivots) == 0
        ):
            raise ValueError(
                "pivots are the numbers of image and of text tokens that are pivots, not "
                f"{self.pivots}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI, states_BID = candidates(tokens), image_states(tokens)
        assert tokens.states_BND is not None
        text, first, size_BN = tokens.text, tokens.text + tokens.num_prefix_tokens, _size(tokens)

        # Pivots: the largest words of the question, and the largest image tokens, which are kept.
        words_BT = question_words(tokens)
        wanted_text = min(self.pivots[1], text)
        text_BP, text_real_BP = _largest(size_BN[:, :text], words_BT, wanted_text, words_BT.sum(1))
        wanted_B = torch.where(text_real_BP.any(1), self.pivots[0], max(self.pivots[0], 1))
        image_BP, image_real_BP = _largest(
            size_BN[:, first:],
            valid_BI,
            min(max(self.pivots[0], 1), most),
            torch.minimum(wanted_B, num_keep_B),
        )
        pivot_BP = torch.cat([first + image_BP, text_BP], 1)
        real_BP = torch.cat([image_real_BP, text_real_BP], 1)
        numbers = torch.arange(valid_BI.shape[1], device=valid_BI.device)
        chosen_BI = ((numbers == image_BP[..., None]) & image_real_BP[..., None]).any(1)

        # Quotas: equal parts of the remaining budget.
        remaining_B, count_B = num_keep_B - chosen_BI.sum(1), real_BP.sum(1).clamp_min(1)
        one_more_BP = real_BP.long().cumsum(1) <= (remaining_B % count_B)[:, None]
        quota_BP = ((remaining_B // count_B)[:, None] + one_more_BP) * real_BP

        pivots_BPD = tokens_at(tokens.states_BND, pivot_BP)
        similarity_BPI = unit_vectors(pivots_BPD) @ unit_vectors(states_BID).transpose(1, 2)
        return take_unlike(similarity_BPI, quota_BP, chosen_BI, valid_BI)


def take_unlike(
    similarity_BPI: Tensor, quota_BP: Tensor, chosen_BI: Tensor, valid_BI: Tensor
) -> Tensor:
    """The chosen tokens and, for each pivot in turn, its quota of the least similar ones: bool
    [B,I]."""
    for pivot in range(quota_BP.shape[1]):
        free_BI = valid_BI & ~chosen_BI
        unlike_BI = (-similarity_BPI[:, pivot]).masked_fill(~free_BI, -torch.inf)
        chosen_BI = chosen_BI | free_BI & (rank(unlike_BI) < quota_BP[:, pivot, None])
    return chosen_BI


def _largest(
    size_BN: Tensor, valid_BN: Tensor, count: int, real_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The `count` largest tokens [B,P] in falling order, and which of these are among the first
    `real_B`."""
    index_BP = size_BN.masked_fill(~valid_BN, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )[:, :count]
    return index_BP, torch.arange(index_BP.shape[1], device=size_BN.device) < real_B[:, None]


def _size(tokens: Tokens) -> Tensor:
    """L1 norm of every token's key over all heads, or of its embedding, float32 [B,N]."""
    if tokens.keys_BHNC is not None:
        return tokens.keys_BHNC.float().abs().sum((1, 3))
    assert tokens.states_BND is not None
    return tokens.states_BND.float().abs().sum(2)
