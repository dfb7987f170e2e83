"""A key-value cache whose layers hold fewer tokens than the model believes.

The model goes on counting every token of the prompt: positions, masks and the slicing of a longer conversation stay as
they are. Each layer of the cache knows which of these tokens it holds, and its attention masks are cut to them.

Shape suffixes: B samples, H heads, K cached tokens, Q tokens of this call, L tokens as the model counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_ATTRIBUTE = "_pumer_held"


@dataclass(frozen=True)
class Held:
    """What one layer of a cache holds of the tokens up to `covered`; all that come later it holds too.

    Args:
        place_BK: their places as the model counts them.
        filled_BK: bool, false for empty slots; None where there are none.
        covered: tokens that the model had counted when this was made.
    """

    place_BK: Tensor
    filled_BK: Tensor | None
    covered: int

    def upto(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Places [B,K] and filled slots when the model has counted `length` tokens."""
        batch, device = len(self.place_BK), self.place_BK.device
        later = torch.arange(self.covered, length, device=device).expand(batch, -1)
        filled = self.filled_BK
        if filled is not None:
            filled = torch.cat([filled, torch.ones_like(later, dtype=torch.bool)], 1)
        return torch.cat([self.place_BK, later], 1), filled

    def rows(self, index: Tensor) -> Held:
        """The same for some samples."""
        filled = None if self.filled_BK is None else self.filled_BK.index_select(0, index)
        return Held(self.place_BK.index_select(0, index), filled, self.covered)


@dataclass
class Book:
    """What every reduced layer of one cache holds, by number."""

    held: dict[int, Held] = field(default_factory=dict)


def check(cache: Any) -> None:
    """Raise ValueError for a cache whose layers must all hold the same number of tokens."""
    layers = () if cache is None else cache.layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        kind = next(type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer)
        raise ValueError(
            f"a reduced model fills its cache to a different length in every layer, which {kind} cannot hold: "
            "leave cache_implementation unset, for transformers' DynamicCache"
        )


def book(cache: Any) -> Book | None:
    """What is known of a cache that a reduced forward has filled; None for any other."""
    found = None if cache is None else vars(cache).get(_ATTRIBUTE)
    if found is not None and not (cache.layers and cache.layers[0].is_initialized):
        found.held.clear()  # the cache was reset
        return None
    return found


def before(
    held: Held | None, past: int, cached: int | None, own_BK: Tensor, filled_BK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Places of the cached tokens and behind them those of this call, and which of them are filled.

    Args:
        held: what the layer holds; None if it holds every token.
        past: tokens in the cache as the model counts them.
        cached: how many of the held tokens the cache has kept, the last ones; None for all.
        own_BK, filled_BK: those of this call.
    """
    if held is None:
        places, filled = torch.arange(past, device=own_BK.device).expand(len(own_BK), -1), None
    else:
        places, filled = held.upto(past)
    if cached is not None:
        places, filled = places[:, -cached:], None if filled is None else filled[:, -cached:]
    if filled is not None or filled_BK is not None:
        filled = torch.ones_like(places, dtype=torch.bool) if filled is None else filled
        own = torch.ones_like(own_BK, dtype=torch.bool) if filled_BK is None else filled_BK
        filled = torch.cat([filled, own], 1)
    return torch.cat([places, own_BK], 1), filled


def length(cache: Any) -> int:
    """Tokens in the cache as the model counts them."""
    return 0 if cache is None else int(cache.get_seq_length())


def write(cache: Cache, held: dict[int, Held]) -> None:
    """Note what the layers hold after a reduced forward, and let them report the unreduced length."""
    known = vars(cache).get(_ATTRIBUTE)
    if known is None:
        known = Book()
        setattr(cache, _ATTRIBUTE, known)
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
            setattr(cache, name, _Rows(cache, name))
    known.held.update(held)
    for number, entry in held.items():
        layer: Any = cache.layers[number]
        missing = entry.covered - entry.place_BK.shape[1]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = entry.covered
            layer.crop = _SlidingCrop(layer)
        else:
            layer.get_seq_length = _Length(layer, missing)


class _Length:
    """In place of `DynamicLayer.get_seq_length`: the tokens that the model has counted."""

    def __init__(self, layer: DynamicLayer, missing: int) -> None:
        self.layer, self.missing = layer, missing

    def __call__(self) -> int:
        held = type(self.layer).get_seq_length(self.layer)
        return held + self.missing if held else 0


class _SlidingCrop:
    """In place of `DynamicSlidingWindowLayer.crop`, which counts the tokens it holds."""

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        self.layer = layer

    def __call__(self, tokens_to_remove: int) -> None:
        before = self.layer.cumulative_length
        type(self.layer).crop(self.layer, tokens_to_remove)
        self.layer.cumulative_length = before - abs(tokens_to_remove)


class _Rows:
    """In place of the methods of `Cache` that take, reorder or repeat samples."""

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, rows: Any) -> None:
        getattr(type(self.cache), self.name)(self.cache, rows)
        known = vars(self.cache)[_ATTRIBUTE]
        for number, held in known.held.items():
            device = held.place_BK.device
            if isinstance(rows, int):
                index = torch.arange(len(held.place_BK), device=device).repeat_interleave(rows)
            else:
                index = rows.to(device)
            known.held[number] = held.rows(index)
