"""MMTok: greedy coverage of the words of the question and of the image.

Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026,
arXiv 2508.18264.

Shape suffixes: B batch, T text tokens, I image tokens, R what is covered (T + I), D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Traits
from pumer.reducers.ops.greedy import cosines, coverage
from pumer.reducers.ops.matching import unit_vectors
from pumer.reducers.ops.saliency import question_words
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, candidates, encoded, image_states
from pumer.reducers.tokens import Tokens

GAIN_DECIMALS = 13
"""Gains are rounded to these, so that equal tokens have equal gains whatever the padding."""


@register
@dataclass(frozen=True)
class MMTok(Selector):
    """Select, one by one, the image token that adds most to the coverage of words and image.

    How much a token covers of a word is its share in a softmax of cosines over the image; of an
    image token, the same with the encoder's features. Coverage is the sum of the largest shares
    among the selected tokens. The published code leaves out stop words on LLaVA but not on Qwen;
    here all words of the question count, or those in `question_mask`.

    Args:
        keep: image tokens to keep: a share (float) or a number (int).
        alpha: weight of all image tokens together; that of all words is 1.
        text_temperature: of the softmax for words. Published: 0.02 for LLaVA, 0.01 for Qwen2.5-VL.
        image_temperature: of the softmax for image tokens.

    Example:
        >>> llava = pumer.apply(llava, pumer.MMTok(keep=4))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 4)
    """

    name = "mmtok"
    alpha: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha is a weight from 0, not {self.alpha}")
        for name in ("text_temperature", "image_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is larger than 0, not {getattr(self, name)}")

    @property
    def traits(self) -> Traits:
        return Traits(needs_encoder=frozenset({"features_BND"}), needs_text=True)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        weight_BI = valid_BI.double()
        bonus_BI = torch.zeros_like(weight_BI)
        cover_BIR = self.cover(tokens)
        return coverage(
            cover_BIR, weight_BI, bonus_BI, valid_BI, num_keep_B, most, decimals=GAIN_DECIMALS
        )

    def cover(self, tokens: Tokens) -> Tensor:
        """How much of every word and of every image token each image token covers, float64
        [B,I,R]."""
        assert tokens.states_BND is not None
        valid_BI, words_BT = candidates(tokens), question_words(tokens)
        words_BTD = tokens.states_BND[:, : tokens.text].double()
        words_BTD = torch.where(words_BT[..., None] & words_BTD.isfinite(), words_BTD, 0.0)
        unit_image_BID = unit_vectors(image_states(tokens), torch.float64)
        unit_words_BTD = unit_vectors(words_BTD, torch.float64)
        of_words_BTI = (unit_words_BTD @ unit_image_BID.transpose(1, 2)).round(decimals=10)
        of_image_BII = cosines(encoded(tokens, "features_BND"))
        cover_BRI = torch.cat(
            [
                _shares(of_words_BTI, words_BT, valid_BI, self.text_temperature),
                _shares(of_image_BII, valid_BI, valid_BI, self.image_temperature) * self.alpha,
            ],
            1,
        )
        return cover_BRI.transpose(1, 2).contiguous()


def _shares(cosine_BRI: Tensor, rows_BR: Tensor, valid_BI: Tensor, temperature: float) -> Tensor:
    """Softmax of every row over the real image tokens, divided by the number of real rows."""
    logits_BRI = cosine_BRI / temperature
    lowest = torch.finfo(logits_BRI.dtype).min
    share_BRI = logits_BRI.masked_fill(~valid_BI[:, None], lowest).softmax(-1)
    share_BRI = share_BRI * (rows_BR[..., None] & valid_BI[:, None])
    return share_BRI / rows_BR.sum(1).clamp_min(1)[:, None, None]
