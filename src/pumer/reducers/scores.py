"""Saliency: how much a token matters, from the queries and keys of one layer.

Shape suffixes: B batch, H heads, N tokens, T text tokens, I image tokens, C channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pumer.reducers.base import Tokens

SCORES = ("mean_head", "first_head", "k_metric", "qk")
"""Ways to score image tokens by the text: attention averaged over heads, attention of head 0, key-key and
mean-query-key products (names as in the published PuMer code)."""


def text_attention(tokens: Tokens, heads: slice = slice(None)) -> Tensor:
    """Attention of the text rows to the image columns [B,h,T,I], of the softmax over all real keys that a row sees.

    Only these rows are computed, whatever attention kernel the layer itself uses. Structure tokens that no reducer is
    shown, such as the newlines of LLaVA-NeXT's pictures, are no keys of this softmax, where published methods (FastV,
    PyramidDrop, SparseVLM) read one that has them.
    """
    if tokens.queries_BHNC is None or tokens.keys_BHNC is None:
        raise ValueError("there is no attention before the first layer: give `layers` numbers from 0")
    if tokens.attention_BHNN is not None:
        attention = tokens.attention_BHNN[:, heads].float()
        return attention if tokens.cross else attention[:, :, : tokens.text, tokens.image]
    first = tokens.text if tokens.cross else 0
    queries, keys = tokens.queries_BHNC[:, heads, : tokens.text], tokens.keys_BHNC[:, heads, first:]
    # Scaled before they are multiplied: in half precision the product alone may be too large. Keys are a view of a
    # larger tensor, which the product would copy transposed, at five times the cost of a plain copy.
    logits = (queries / math.sqrt(queries.shape[3]) @ keys.contiguous().transpose(2, 3)).float()
    seen_BTN = tokens.valid_BN[:, None, first:]
    if tokens.place_BN is not None:
        # Padding is let see all: a row of nothing but -inf would not be zero but NaN.
        text_BT1 = tokens.place_BN[:, : tokens.text, None]
        seen_BTN = seen_BTN & (
            (tokens.place_BN[:, None, first:] <= text_BT1) | ~tokens.valid_BN[:, : tokens.text, None]
        )
    logits = torch.where(seen_BTN[:, None], logits, -torch.inf)
    return logits.softmax(-1)[..., tokens.text - first :]


def last_text_attention(tokens: Tokens) -> Tensor:
    """Attention of the last token of the prompt to every image token, mean over the heads, float32 [B,I].

    That is the last real one of the text. Where attention is causal and an image stands behind that, it is the last one
    of this image: the text has not seen it, so its attention to it would be none that the model has.
    """
    if tokens.text == 0:
        raise ValueError("there is no text whose last token could rate the image")
    if tokens.queries_BHNC is None:
        raise ValueError("there is no attention before the first layer: give `layers` numbers from 0")
    if tokens.place_BN is None:
        last_B1 = (tokens.valid_BN[:, : tokens.text].sum(1, keepdim=True) - 1).clamp_min(0)
    else:
        last_B1 = tokens.place_BN.masked_fill(~tokens.valid_BN, -1).argmax(1, keepdim=True)
    queries = tokens.queries_BHNC
    shape = (-1, queries.shape[1], -1, queries.shape[3])
    row = queries.gather(2, last_B1[:, None, :, None].expand(*shape))
    one = replace(tokens, queries_BHNC=row, place_BN=None)
    return text_attention(one).mean(1)[:, 0]


def text_saliency(tokens: Tokens, score: str = "mean_head", rows_BT: Tensor | None = None) -> Tensor:
    """How much the text attends to every image token, float32 [B,I] (PuMer, section 3.2, equation 1).

    Args:
        tokens: the joint token axis of one layer.
        score: one of `SCORES`.
        rows_BT: weights of the text rows; the real tokens if not given.
    """
    rows_BT = tokens.valid_BN[:, : tokens.text] if rows_BT is None else rows_BT
    rows = rows_BT.float()
    if score in ("mean_head", "first_head"):
        heads = slice(None) if score == "mean_head" else slice(0, 1)
        return torch.einsum("bti,bt->bi", text_attention(tokens, heads).mean(1), rows)
    text = tokens.mean_keys_BNC if score == "k_metric" else _mean_queries(tokens)
    summed = torch.einsum("btc,bt->bc", text[:, : tokens.text].float(), rows)
    return torch.einsum("bc,bic->bi", summed, tokens.mean_keys_BNC[:, tokens.image].float())


def _mean_queries(tokens: Tokens) -> Tensor:
    if tokens.queries_BHNC is None:
        raise ValueError("there are no queries before the first layer: give `layers` numbers from 0")
    return tokens.queries_BHNC.mean(1)
