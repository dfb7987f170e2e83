"""Saliency: how much a token matters, from the queries and keys of one layer.

Shape suffixes: B batch, H heads, N tokens, T text tokens, R some of these, I image tokens, M tokens
of the context, J keys of a softmax, C channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.ops.blocks import row_blocks
from pumer.reducers.tokens import Tokens

SCORES = ("mean_head", "first_head", "k_metric", "qk")
"""Ways to score image tokens by the text: attention averaged over heads, attention of head 0,
key-key and mean-query-key products (names as in the published PuMer code)."""

UNSEEN = torch.finfo(torch.float32).min
"""Logit of a masked key; finite, because a row of only -inf would give NaN."""


@dataclass(frozen=True)
class TextAttention:
    """Attention of text rows to the image, with the softmax over all keys that they see in the
    model.

    Only the requested rows are computed, independent of the layer's attention kernel. The keys are
    those of the tokens and of `Tokens.context`: cached prefixes, other turns, separators and
    structure tokens.

    Args:
        tokens: of one layer.
        heads: the heads to read.
        keys_BHJC: keys of the image, then of the context, then of the text, so that with a causal
            mask a slice leaves out the words after a block of rows. Only of the image if the
            kernel returns the normalizer (`Tokens.normalizer_BHN`).
        valid_BJ: bool, false for padding.
        place_BJ: positions of the keys; None without a causal mask.
    """

    tokens: Tokens
    heads: slice
    keys_BHJC: Tensor
    valid_BJ: Tensor
    place_BJ: Tensor | None

    @classmethod
    def of(cls, tokens: Tokens, heads: slice = slice(None)) -> TextAttention:
        """Collect the keys; raises ValueError before the first layer, which has no attention."""
        if tokens.queries_BHNC is None or tokens.keys_BHNC is None:
            raise ValueError(
                "there is no attention before the first layer: give `layers` numbers from 0"
            )
        text, image, context = slice(0, tokens.text), tokens.image, tokens.context
        keys_BHNC, valid_BN, place_BN = tokens.keys_BHNC, tokens.valid_BN, tokens.place_BN
        keys, valid, places = [keys_BHNC[:, heads, image]], [valid_BN[:, image]], []
        if place_BN is not None:
            places.append(place_BN[:, image])
        summed = tokens.normalizer_BHN is not None
        if context is not None and not summed:
            keys.append(context.keys_BHMC[:, heads])
            valid.append(context.valid_BM)
            if place_BN is not None and context.place_BM is not None:
                places.append(context.place_BM)
        if not tokens.cross and not summed:
            keys.append(keys_BHNC[:, heads, text])
            valid.append(valid_BN[:, text])
            if place_BN is not None:
                places.append(place_BN[:, text])
        valid_BJ = torch.cat(valid, 1)
        # Padding may be NaN, which no mask on the logits removes.
        keys_BHJC = torch.cat(keys, 2).masked_fill_(~valid_BJ[:, None, :, None], 0)
        place_BJ = torch.cat(places, 1) if places else None
        return cls(tokens, heads, keys_BHJC, valid_BJ, place_BJ)

    def blocks(self) -> list[slice]:
        """Slices of text rows whose attention fits into memory."""
        batch, heads, keys, width = self.keys_BHJC.shape
        return row_blocks(self.tokens.text, batch * heads * keys, width)

    def rows(self, rows: slice) -> Tensor:
        """Attention of these text rows to the image, its [CLS] included, float32 [B,H,R,I]."""
        tokens = self.tokens
        if tokens.attention_BHNN is not None:
            attention = tokens.attention_BHNN[:, self.heads, rows].float()
            return attention if tokens.cross else attention[..., tokens.image]
        assert tokens.queries_BHNC is not None
        # Padding has weight 0, and 0 * NaN is NaN.
        padding_BR = ~tokens.valid_BN[:, : tokens.text][:, rows]
        queries_BHRC = tokens.queries_BHNC[:, self.heads, rows]
        queries_BHRC = queries_BHRC.masked_fill(padding_BR[:, None, :, None], 0)
        place_BR = None if tokens.place_BN is None else tokens.place_BN[:, rows]
        normalizer_BHR, num_keys = None, self.keys_BHJC.shape[2]
        if tokens.normalizer_BHN is not None:
            normalizer_BHR = tokens.normalizer_BHN[:, self.heads, rows].masked_fill(
                padding_BR[:, None], 0
            )
        elif place_BR is not None:
            # Words are in the order of their positions: no row sees the words after this block.
            num_keys -= tokens.text - rows.stop
        return self._attention(queries_BHRC, place_BR, normalizer_BHR, num_keys)

    def row(self, index_B1: Tensor) -> Tensor:
        """Attention of one token per sample to the image, mean over heads, float32 [B,I]."""
        tokens = self.tokens
        if tokens.attention_BHNN is not None:
            attention = _rows_at(tokens.attention_BHNN[:, self.heads], index_B1).float().mean(1)
            return attention[:, 0] if tokens.cross else attention[:, 0, tokens.image]
        assert tokens.queries_BHNC is not None
        queries_BH1C = _rows_at(tokens.queries_BHNC[:, self.heads], index_B1)
        place_B1 = None if tokens.place_BN is None else tokens.place_BN.gather(1, index_B1)
        normalizer_BH1 = None
        if tokens.normalizer_BHN is not None:
            normalizer_BH1 = _rows_at(tokens.normalizer_BHN[:, self.heads, :, None], index_B1)[
                ..., 0
            ]
        return self._attention(
            queries_BH1C, place_B1, normalizer_BH1, self.keys_BHJC.shape[2]
        ).mean(1)[:, 0]

    def _attention(
        self,
        queries_BHRC: Tensor,
        place_BR: Tensor | None,
        normalizer_BHR: Tensor | None,
        num_keys: int,
    ) -> Tensor:
        """Attention to the image of rows that see at most the first `num_keys` keys."""
        # Scale before multiplying: in half precision the product may overflow.
        queries_BHRC = queries_BHRC / math.sqrt(queries_BHRC.shape[3])
        logits_BHRJ = (queries_BHRC @ self.keys_BHJC[:, :, :num_keys].transpose(2, 3)).float()
        context = self.tokens.context
        if context is not None and context.softcap is not None:
            logits_BHRJ = context.softcap * (logits_BHRJ / context.softcap).tanh()

        # Which keys each row sees: real ones, not later than the row, and inside the window.
        seen_BRJ = self.valid_BJ[:, None, :num_keys]
        if place_BR is not None and self.place_BJ is not None:
            key_B1J, row_BR1 = self.place_BJ[:, None, :num_keys], place_BR[..., None]
            seen_BRJ = seen_BRJ & (key_B1J <= row_BR1)
            if context is not None and context.window is not None:
                seen_BRJ &= key_B1J > row_BR1 - context.window
        # Adding a bias is a fifth faster than masking every head.
        bias_BRJ = torch.zeros(seen_BRJ.shape, device=seen_BRJ.device)
        logits_BHRJ += bias_BRJ.masked_fill_(~seen_BRJ, UNSEEN)[:, None]
        if normalizer_BHR is not None:  # the keys are those of the image
            return logits_BHRJ.sub_(normalizer_BHR[..., None]).exp_()
        image = self.tokens.mask_BN.shape[1] - self.tokens.text
        return logits_BHRJ.softmax(-1)[..., :image]


def text_attention(tokens: Tokens, heads: slice = slice(None)) -> Tensor:
    """Attention of all text rows to the image columns, float32 [B,H,T,I]; see `TextAttention`."""
    attention = TextAttention.of(tokens, heads)
    return torch.cat([attention.rows(rows) for rows in attention.blocks()], 2)


def last_text_attention(tokens: Tokens) -> Tensor:
    """Attention of the last token of the prompt to every image token, mean over the heads, float32
    [B,I].

    With a causal mask, the last token has the last position: an image after all text is rated by
    its own last token, because the text has not seen it. Without, it is the last real token of the
    text, or of the image if there is no text. In co-attention, where only text attends to the
    image, all is zero without text.
    """
    return _of_last_token(TextAttention.of(tokens))


def _of_last_token(attention: TextAttention) -> Tensor:
    tokens = attention.tokens
    count, text = tokens.mask_BN.shape[1], tokens.text
    valid_BN = tokens.valid_BN[:, :text] if tokens.cross else tokens.valid_BN
    if count == text or valid_BN.shape[1] == 0:
        return torch.zeros(tokens.mask_BN[:, text:].shape, device=tokens.mask_BN.device)
    if tokens.place_BN is not None:
        order_BN = tokens.place_BN
    else:
        # The last real token in the order image, text.
        order_BN = ((torch.arange(count, device=valid_BN.device) - text) % count)[None]
    order_BN = order_BN[:, : valid_BN.shape[1]].masked_fill(~valid_BN, -1)
    attention_BI = attention.row(order_BN.argmax(1, keepdim=True))
    return torch.where(valid_BN.any(1, keepdim=True), attention_BI, 0.0)


def text_saliency(
    tokens: Tokens, score: str = "mean_head", rows_BT: Tensor | None = None
) -> Tensor:
    """How much the text attends to every image token, float32 [B,I] (PuMer, section 3.2, equation
    1).

    Rows are read in blocks, so that memory is linear in the words. With a causal mask, an image
    that no row has seen is scored by the last token of the prompt; without one, an image without
    text has scores of zero.

    Args:
        tokens: of one layer.
        score: one of `SCORES`.
        rows_BT: weights of the text rows; the real tokens if not given.
    """
    rows_BT = tokens.valid_BN[:, : tokens.text] if rows_BT is None else rows_BT
    weight_BT = rows_BT.float()
    if score in ("mean_head", "first_head"):
        return _attended(tokens, slice(None) if score == "mean_head" else slice(0, 1), weight_BT)
    text = tokens.mean_keys_BNC if score == "k_metric" else _mean_queries(tokens)
    # Rows of weight 0 may be NaN.
    text_BTC = torch.where(weight_BT[..., None] != 0, text[:, : tokens.text].float(), 0.0)
    summed_BC = torch.einsum("btc,bt->bc", text_BTC, weight_BT)
    return torch.einsum("bc,bic->bi", summed_BC, tokens.mean_keys_BNC[:, tokens.image].float())


def question_words(tokens: Tokens) -> Tensor:
    """The words of the question, bool [B,T]: `Tokens.question_BT`, or those after the image.

    All words if there are none of these, or if neither question nor positions are known.
    """
    words_BT = tokens.valid_BN[:, : tokens.text]
    if tokens.question_BT is not None:
        question_BT = words_BT & tokens.question_BT
        return torch.where(question_BT.any(1, keepdim=True), question_BT, words_BT)
    if tokens.place_BN is None:
        return words_BT
    place_BI = tokens.place_BN[:, tokens.image].masked_fill(~tokens.valid_BN[:, tokens.image], -1)
    last_B1 = torch.nn.functional.pad(place_BI, (1, 0), value=-1).amax(1, keepdim=True)
    after_BT = words_BT & (tokens.place_BN[:, : tokens.text] > last_B1)
    return torch.where(after_BT.any(1, keepdim=True), after_BT, words_BT)


def _attended(tokens: Tokens, heads: slice, weight_BT: Tensor) -> Tensor:
    """Weighted sum over text rows of their attention to the image, mean over heads [B,I]."""
    attention = TextAttention.of(tokens, heads)
    batch, width = len(weight_BT), tokens.mask_BN.shape[1] - tokens.text
    count = 1
    total_BI = torch.zeros(batch, width, device=weight_BT.device)
    for rows in attention.blocks():
        weight_BR = weight_BT[:, rows]
        attention_BHRI = attention.rows(rows)
        count = attention_BHRI.shape[1]
        weight_B1K = weight_BR[:, None].expand(-1, count, -1).flatten(1)[:, None]
        total_BI = total_BI + (weight_B1K @ attention_BHRI.flatten(1, 2))[:, 0]
    total_BI = total_BI / count
    if tokens.place_BN is None:
        return total_BI
    unseen_B1 = (total_BI == 0).all(1, keepdim=True)
    return torch.where(unseen_B1, _of_last_token(attention), total_BI)


def _rows_at(x_BHNC: Tensor, index_B1: Tensor) -> Tensor:
    """One row of every sample, [B,H,1,C]."""
    index_BH1C = index_B1[:, None, :, None].expand(-1, x_BHNC.shape[1], -1, x_BHNC.shape[3])
    return x_BHNC.gather(2, index_BH1C)


def _mean_queries(tokens: Tokens) -> Tensor:
    if tokens.queries_BHNC is None:
        raise ValueError(
            "there are no queries before the first layer: give `layers` numbers from 0"
        )
    return tokens.queries_BHNC.mean(1)
