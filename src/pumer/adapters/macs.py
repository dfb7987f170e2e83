"""Counting multiply-accumulates: what families share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pumer.adapters.base import PARTS


def head_macs(model: nn.Module, trunk: nn.Module) -> int:
    """Multiply-accumulates of one token in the linear layers outside the trunk and the reducer."""
    inside = {*trunk.modules(), *getattr(model, PARTS, nn.Module()).modules()}
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in inside
    ]
    return sum(head.in_features * head.out_features for head in heads)


def attention_and_mlp_lengths(
    lengths: Sequence[tuple[int, int]], after_layer: bool
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(text, image) tokens of every layer's attention and of its MLP."""
    return [(before, before if after_layer else after) for before, after in pairwise(lengths)]


def attention_macs(queries: int, keys: int, width: int) -> int:
    """Multiply-accumulates of one attention with its four projections."""
    return 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width


def co_attention_macs(
    lengths: Sequence[tuple[int, int]], width: int, inner: int, after_layer: bool
) -> list[tuple[int, int]]:
    """Multiply-accumulates of every layer's (attention, MLP), for layers of a text half, after
    whose attention tokens leave, and an image half."""
    costs = []
    for (text, image), (new_text, new_image) in attention_and_mlp_lengths(lengths, after_layer):
        attention = attention_macs(text, text, width) + attention_macs(text, image, width)
        attention += attention_macs(new_image, new_image, width)
        attention += attention_macs(new_image, new_text, width)
        costs.append((attention, 2 * (new_text + new_image) * width * inner))
    return costs


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers."""
    return sum(
        part.in_features * part.out_features
        for part in module.modules()
        if isinstance(part, nn.Linear)
    )
