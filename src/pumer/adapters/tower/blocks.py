"""A layer of a vision transformer, with the reduction between its attention and its MLP.

Layers of all families do the same: a norm, attention, a residual; a norm, an MLP, a residual. They
call these parts by different names, which are all in this file, and none has a hook between the
two halves.

Shape suffixes: B images, N tokens, D channels, H heads, C channels of a head, S patches of all
images in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.encoder import inplace
from pumer.adapters.macs import linear_weights

FIRST_NORM = ("layer_norm1", "layernorm_before", "norm1", "attention_norm")
SECOND_NORM = ("layer_norm2", "layernorm_after", "norm2", "ffn_norm")
ATTENTION = ("self_attn", "attention", "attn")
MLP = ("mlp", "feed_forward")
QUERIES, KEYS, VALUES = ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")
OUT = ("out_proj", "o_proj", "projection_layer", "proj")
HEADS = ("num_heads", "num_attention_heads")
DROPOUT = ("attention_dropout", "dropout")

Positions = tuple[Tensor, Tensor]
"""Cosines and sines of rotary embeddings, of every token."""


def part(module: Any, names: Sequence[str]) -> Any:
    """The part of a module that has one of these names."""
    return getattr(module, next(name for name in names if hasattr(module, name)))


def is_known(layer: nn.Module) -> bool:
    """Whether a layer has the parts that this file names, and no others that count."""
    groups = (FIRST_NORM, SECOND_NORM, ATTENTION, MLP)
    if not all(any(hasattr(layer, name) for name in names) for names in groups):
        return False
    attention = part(layer, ATTENTION)
    projects = any(hasattr(attention, name) for name in ("qkv", *QUERIES))
    return projects and all(
        any(hasattr(attention, name) for name in names) for names in (OUT, HEADS)
    )


def project(
    attention: Any, normed: Tensor, positions: Positions | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B,H,N,C] of an attention, of states [B,N,D] or of [S,D], which is
    one row then."""
    heads = part(attention, HEADS)
    if hasattr(attention, "qkv"):
        parts = attention.qkv(normed).unflatten(-1, (3, heads, -1)).unbind(-3)
    else:
        projected = [part(attention, names)(normed) for names in (QUERIES, KEYS, VALUES)]
        for index, name in enumerate(("q_norm", "k_norm")):
            if hasattr(attention, name):
                projected[index] = getattr(attention, name)(projected[index])
        parts = tuple(each.unflatten(-1, (heads, -1)) for each in projected)
    queries, keys, values = (
        (each if each.ndim == 4 else each[None]).transpose(1, 2) for each in parts
    )
    if positions is not None:
        queries, keys = _rotate(queries, positions), _rotate(keys, positions)
    return queries, keys, values


def _rotate(states_BHNC: Tensor, positions: Positions) -> Tensor:
    """Rotary embeddings, in float32 as the models compute them."""
    cos, sin = (each.float() for each in positions)
    states = states_BHNC.float()
    low, high = states.chunk(2, -1)
    return (states * cos + torch.cat([-high, low], -1) * sin).to(states_BHNC.dtype)


def dropout_of(attention: Any) -> float:
    """The dropout of an attention's probabilities, as it is now."""
    return float(part(attention, DROPOUT)) if attention.training else 0.0


def attention_half(layer: Any, states: Tensor, context: Tensor) -> Tensor:
    """States behind the attention, from its context [B,N,H*C] or [S,H*C]."""
    attention = part(layer, ATTENTION)
    fresh = part(attention, OUT)(context)
    if hasattr(attention, "projection_dropout"):
        fresh = attention.projection_dropout(fresh)
    return inplace.add(_scaled(layer, 1, fresh), states)


def mlp_half(layer: Any, states: Tensor) -> Tensor:
    """States behind the MLP."""
    fresh = part(layer, MLP)(part(layer, SECOND_NORM)(states))
    return inplace.add(_scaled(layer, 2, fresh), states)


def _scaled(layer: Any, half: int, fresh: Tensor) -> Tensor:
    """What a layer does to the output of one of its halves before it is added."""
    if hasattr(layer, "lambda_1"):  # InternVL, which drops out behind the MLP alone
        fresh = fresh if half == 1 else layer.dropout(fresh)
        scaled: Tensor = getattr(layer, f"lambda_{half}") * fresh
        return scaled
    if hasattr(layer, "layer_scale1"):  # DINOv2
        return layer.drop_path(getattr(layer, f"layer_scale{half}")(fresh))
    if isinstance(getattr(layer, "dropout", None), nn.Module):  # ViT
        return layer.dropout(fresh)
    return fresh


def layer_macs(
    layer: nn.Module, before: int, after: int, keys: int | None = None
) -> tuple[int, int]:
    """Multiply-accumulates of a layer's attention over so many tokens, each of which attends to
    all or to so many `keys`, and of its MLP over those that are left."""
    attention = part(layer, ATTENTION)
    width = part(attention, OUT).in_features
    projections = linear_weights(attention)
    pairs = before * (before if keys is None else keys)
    return before * projections + 2 * pairs * width, after * linear_weights(part(layer, MLP))
