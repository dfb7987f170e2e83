"""A key-value cache whose layers hold fewer tokens than the model believes.

The model goes on counting every token of the prompt: positions, masks and the slicing of a longer
conversation stay as they are. Each layer of the cache knows which of these tokens it holds, and its
attention masks are cut to them.

Such a layer is given another class. Methods set on it would hold the layer that holds them, and its
tensors would wait for the garbage collector.

Shape suffixes: B samples, H heads, K cached tokens, Q tokens of this call, L tokens as the model
counts them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from pumer.adapters.decoder.prompt import current_state
from pumer.adapters.forward import max_length

_ATTRIBUTE = "_pumer_held"
NAMES = ("cache", "past_key_values")
"""What transformers calls the cache, from 5.24 on and before."""


@dataclass(frozen=True)
class Held:
    """What one layer of a cache holds of the tokens up to `covered`; all that come later it holds
    too.

    Args:
        place_BK: their places as the model counts them.
        filled_BK: bool, false for empty slots; None where there are none.
        covered: tokens that the model had counted when this was made.
        made: what was made of it, by what was asked: layers that share this one share that, and one
            mask.
    """

    place_BK: Tensor
    filled_BK: Tensor | None
    covered: int
    made: dict[Any, Held] = field(default_factory=dict, repr=False, compare=False)

    @property
    def missing(self) -> int:
        """How many fewer these are than the model has counted."""
        return self.covered - self.place_BK.shape[1]

    def upto(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Places [B,K] and filled slots when the model has counted `length` tokens."""
        batch, device = len(self.place_BK), self.place_BK.device
        later = torch.arange(self.covered, length, device=device).expand(batch, -1)
        filled = self.filled_BK
        if filled is not None:
            filled = torch.cat([filled, torch.ones_like(later, dtype=torch.bool)], 1)
        return torch.cat([self.place_BK, later], 1), filled

    def before(self, length: int) -> Held:
        """The same when the model has gone back to `length` tokens; the host waits to know how many
        slots that is."""
        key = "before", length
        if key not in self.made:
            stays_BK = self.place_BK < length
            if self.filled_BK is not None:
                stays_BK = stays_BK & self.filled_BK
            slots = int(max_length(stays_BK))
            stays_BK = stays_BK[:, :slots]
            place_BK = torch.where(
                stays_BK, self.place_BK[:, :slots], 0
            )  # an empty slot's has to be one, too
            self.made[key] = Held(place_BK, None if bool(stays_BK.all()) else stays_BK, length)
        return self.made[key]

    def rows(self, rows: Tensor | int) -> Held:
        """The same for the samples of that index, or for every sample so many times."""
        if rows not in self.made:
            batch, device = len(self.place_BK), self.place_BK.device
            every = torch.arange(batch, device=device)
            index = every.repeat_interleave(rows) if isinstance(rows, int) else rows.to(device)
            filled = None if self.filled_BK is None else self.filled_BK[index]
            self.made[rows] = Held(self.place_BK[index], filled, self.covered)
        return self.made[rows]


class _Shorter(DynamicLayer):
    """A layer that holds fewer tokens than the model has counted."""

    _pumer_held: Held

    def get_seq_length(self) -> int:
        held = super().get_seq_length()
        return held + self._pumer_held.missing if held else 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if current_state() is None:
            raise ValueError(
                "this cache holds fewer tokens than its prompt had, which only the reduced model "
                "knows how to mask: "
                "decode with the model and the reducer that filled it, or prefill again without a "
                "reducer"
            )
        return super().update(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back that many tokens as the model counts them: of those of the prompt the ones that
        are here."""
        held, counted = self._pumer_held, self.get_seq_length()
        remaining = counted + tokens_to_remove
        if tokens_to_remove < 0 and remaining < held.covered:
            self._pumer_held = held.before(remaining)
            tokens_to_remove = (
                held.covered - counted + self._pumer_held.place_BK.shape[1] - held.place_BK.shape[1]
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        stock = DynamicSlidingWindowLayer if self.is_sliding else DynamicLayer
        del self._pumer_held
        self.__class__ = stock
        self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._pumer_held = self._pumer_held.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._pumer_held = self._pumer_held.rows(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pumer_held = self._pumer_held.rows(indices)


class _ShorterSliding(_Shorter, DynamicSlidingWindowLayer):
    """The same with a sliding window; this one counts by itself, but after a crop what it holds."""

    cumulative_length: int

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        remaining = self.cumulative_length - abs(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.cumulative_length = remaining


def find(inputs: Mapping[str, Any]) -> Any:
    """The cache among what a module of transformers is called with, or gives; None if there is
    none."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def argument(module: nn.Module) -> str:
    """The name by which a module of transformers takes a cache."""
    parameters = inspect.signature(type(module).forward).parameters
    return next(name for name in NAMES if name in parameters)


def check(cache: Any) -> None:
    """Raise ValueError for a cache whose layers must all hold the same number of tokens."""
    layers = () if cache is None else cache.layers
    supported = (DynamicLayer, DynamicSlidingWindowLayer, _Shorter, _ShorterSliding)
    unsupported = next(
        (type(layer).__name__ for layer in layers if type(layer) not in supported), None
    )
    if unsupported is not None:
        raise ValueError(
            "a reduced model fills its cache to a different length in every layer, which "
            f"{unsupported} "
            "cannot hold: "
            "leave cache_implementation unset, for transformers' DynamicCache"
        )


def held(cache: Any, number: int) -> Held | None:
    """What a layer of a cache holds; None for all, as in every cache that no reduced forward has
    filled."""
    layers = getattr(cache, "layers", ())
    return getattr(layers[number], _ATTRIBUTE, None) if number < len(layers) else None


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
        valid_BK = torch.ones_like(own_BK, dtype=torch.bool) if filled_BK is None else filled_BK
        filled = torch.cat([filled, valid_BK], 1)
    return torch.cat([places, own_BK], 1), filled


def length(cache: Any) -> int:
    """Tokens in the cache as the model counts them."""
    return 0 if cache is None else int(cache.get_seq_length())


def write(cache: Cache, held: dict[int, Held]) -> None:
    """Note what the layers hold after a reduced forward, and let them report the unreduced
    length."""
    for layer_index, entry in held.items():
        layer: Any = cache.layers[layer_index]
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        layer.__class__ = _ShorterSliding if sliding else _Shorter
        setattr(layer, _ATTRIBUTE, entry)
        if sliding:
            layer.cumulative_length = entry.covered
