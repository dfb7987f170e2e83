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


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers."""
    return sum(
        part.in_features * part.out_features
        for part in module.modules()
        if isinstance(part, nn.Linear)
    )
