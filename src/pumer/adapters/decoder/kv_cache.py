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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from pumer.adapters.decoder.prompt import current_state
from pumer.adapters.forward import max_length

_ATTRIBUTE = "_pumer_layout"
NAMES = ("cache", "past_key_values")
"""What transformers calls the cache, from 5.24 on and before."""
NEEDS_REDUCER = (
    "this cache holds fewer tokens than its prompt had, which only the reduced model knows how to "
    "mask: decode with the model and the reducer that filled it, or prefill again without a reducer"
)
APART = "reference_sliding_attention"
"""The type of a layer that keeps its prompt, and of what is written behind it a window."""
HOLDS_NOTHING = "DummyLayer"
"""The class of a layer of a cache whose attention reads the keys of another layer, from 5.24 on."""


@dataclass(frozen=True)
class CacheLayout:
    """Which of the first `covered` tokens one layer of a cache holds; it holds all later ones.

    Args:
        position_BK: their positions as the model counts them.
        filled_BK: bool, false for empty slots; None where there are none.
        covered: tokens that the model had counted by then.
        derived: layouts made from this one: layers that share this one share them, and one mask.
    """

    position_BK: Tensor
    filled_BK: Tensor | None
    covered: int
    derived: dict[Any, CacheLayout] = field(default_factory=dict, repr=False, compare=False)

    @property
    def missing(self) -> int:
        """How many tokens fewer than the model has counted."""
        return self.covered - self.position_BK.shape[1]

    def extend_to(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Positions [B,K] and filled slots once the model has counted `length` tokens."""
        batch, device = len(self.position_BK), self.position_BK.device
        later = torch.arange(self.covered, length, device=device).expand(batch, -1)
        filled = self.filled_BK
        if filled is not None:
            filled = torch.cat([filled, torch.ones_like(later, dtype=torch.bool)], 1)
        return torch.cat([self.position_BK, later], 1), filled

    def crop_to(self, length: int) -> CacheLayout:
        """The layout once the model has gone back to `length` tokens; the host waits for the number
        of slots."""
        key = "crop", length
        if key not in self.derived:
            stays_BK = self.position_BK < length
            if self.filled_BK is not None:
                stays_BK = stays_BK & self.filled_BK
            slots = int(max_length(stays_BK))
            stays_BK = stays_BK[:, :slots]
            position_BK = torch.where(
                stays_BK, self.position_BK[:, :slots], 0
            )  # an empty slot's has to be one, too
            self.derived[key] = CacheLayout(
                position_BK, None if bool(stays_BK.all()) else stays_BK, length
            )
        return self.derived[key]

    def cropped(self, counted: int, tokens_to_remove: int) -> tuple[CacheLayout, int]:
        """The layout once that many tokens, a number below 0, of `counted` ones are gone, and how
        many of them are here."""
        remaining = counted + tokens_to_remove
        if tokens_to_remove >= 0 or remaining >= self.covered:
            return self, tokens_to_remove
        layout = self.crop_to(remaining)
        gone = self.covered - counted + layout.position_BK.shape[1] - self.position_BK.shape[1]
        return layout, gone

    def select(self, rows: Tensor | int) -> CacheLayout:
        """The layout of the samples with these indices, or of every sample so many times."""
        if rows not in self.derived:
            batch, device = len(self.position_BK), self.position_BK.device
            every = torch.arange(batch, device=device)
            index = every.repeat_interleave(rows) if isinstance(rows, int) else rows.to(device)
            filled = None if self.filled_BK is None else self.filled_BK[index]
            self.derived[rows] = CacheLayout(self.position_BK[index], filled, self.covered)
        return self.derived[rows]


class ReducedDynamicLayer(DynamicLayer):
    """A cache layer that holds fewer tokens than the model has counted."""

    _pumer_layout: CacheLayout

    def get_seq_length(self) -> int:
        num_held = super().get_seq_length()
        return num_held + self._pumer_layout.missing if num_held else 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if current_state() is None:
            raise ValueError(NEEDS_REDUCER)
        return super().update(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many tokens as the model counts them: those of them that are here."""
        layout, counted = self._pumer_layout, self.get_seq_length()
        self._pumer_layout, tokens_to_remove = layout.cropped(counted, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        stock = DynamicSlidingWindowLayer if self.is_sliding else DynamicLayer
        del self._pumer_layout
        self.__class__ = stock
        self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._pumer_layout = self._pumer_layout.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._pumer_layout = self._pumer_layout.select(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pumer_layout = self._pumer_layout.select(indices)


class ReducedSlidingLayer(ReducedDynamicLayer, DynamicSlidingWindowLayer):
    """The same with a sliding window; this one counts by itself, but after a crop what it holds."""

    cumulative_length: int

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        remaining = self.cumulative_length - abs(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.cumulative_length = remaining


class _ReducedApart(ReducedDynamicLayer):
    """The same of a layer that keeps its prompt apart, which counts both parts itself."""

    cumulative_length: int

    def get_seq_length(self) -> int:
        return super(ReducedDynamicLayer, self).get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        if abs(tokens_to_remove) > self.cumulative_length:
            raise ValueError(
                "this cache cannot go back into a reduced prompt: prefill again with a new one"
            )
        super(ReducedDynamicLayer, self).crop(tokens_to_remove)

    def reset(self) -> None:
        del self._pumer_layout, self._layer_type
        self.__class__ = type(self).__bases__[-1]
        self.reset()


@lru_cache
def _reduced_apart(stock: type) -> Any:
    """The class of a reduced layer that keeps its prompt apart, of which transformers has one in
    the file of a model.

    Its class has no type: by that, every new cache would take it for the one to make.
    """
    return type(f"Reduced{stock.__name__}", (_ReducedApart, stock), {"_layer_type": None})


def prompt_slots(layer: Any) -> int:
    """Slots of the prompt that a layer keeps apart; 0 where it has one row for all."""
    keys = getattr(layer, "prefill_keys", None)
    return 0 if keys is None else int(keys.shape[-2])


def num_held(layer: Any) -> int:
    """Slots of a layer, those of a prompt that is kept apart included."""
    return prompt_slots(layer) + (layer.keys.shape[-2] if layer.keys.ndim > 1 else 0)


def last_held(x_BL: Tensor, count: int, prompt: int) -> Tensor:
    """Of slots `count`: the first `prompt` ones, which are kept apart, and the last ones."""
    later_BL = x_BL[:, prompt:]
    return torch.cat([x_BL[:, :prompt], later_BL[:, later_BL.shape[1] - count + prompt :]], 1)


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
    supported = (DynamicLayer, DynamicSlidingWindowLayer, ReducedDynamicLayer, ReducedSlidingLayer)
    unsupported = next(
        (
            type(layer).__name__
            for layer in layers
            if type(layer) not in supported
            and type(layer).__name__ != HOLDS_NOTHING
            and not (isinstance(layer, DynamicLayer) and _is_apart(layer))
        ),
        None,
    )
    if any(_is_apart(layer) and layer.get_seq_length() for layer in layers):
        raise ValueError(
            "this cache holds a prompt already, and keeps all that follows in a window: give every "
            "prompt with images a cache of its own"
        )
    if unsupported is not None:
        raise ValueError(
            "a reduced model fills its cache to a different length in every layer, which "
            f"{unsupported} "
            "cannot hold: "
            "leave cache_implementation unset, for transformers' DynamicCache"
        )


def _is_apart(layer: Any) -> bool:
    return getattr(layer, "_layer_type", None) == APART


def layout(cache: Any, layer_index: int) -> CacheLayout | None:
    """What a layer of a cache holds; None for all, as in every cache that no reduced forward has
    filled."""
    if hasattr(cache, _ATTRIBUTE):  # all layers hold the same
        return getattr(cache, _ATTRIBUTE)  # type: ignore[no-any-return]
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer_index], _ATTRIBUTE, None) if layer_index < len(layers) else None


def with_cached(
    held: CacheLayout | None,
    past: int,
    num_cached: int | None,
    position_BK: Tensor,
    filled_BK: Tensor | None,
    prompt: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Positions of the cached tokens and behind them those of this call, and which are filled.

    Args:
        held: what the layer holds; None if it holds every token.
        past: tokens in the cache as the model counts them.
        num_cached: how many of the held tokens the cache has kept, the last ones; None for all.
        position_BK, filled_BK: of this call.
        prompt: of the kept ones those that are the prompt, kept apart.
    """
    if held is None:
        past_L = torch.arange(past, device=position_BK.device)
        positions, filled = past_L.expand(len(position_BK), -1), None
    else:
        positions, filled = held.extend_to(past)
    if num_cached is not None:
        positions = last_held(positions, num_cached, prompt)
        filled = None if filled is None else last_held(filled, num_cached, prompt)
    if filled is not None or filled_BK is not None:
        filled = torch.ones_like(positions, dtype=torch.bool) if filled is None else filled
        valid_BK = (
            torch.ones_like(position_BK, dtype=torch.bool) if filled_BK is None else filled_BK
        )
        filled = torch.cat([filled, valid_BK], 1)
    return torch.cat([positions, position_BK], 1), filled


def length(cache: Any) -> int:
    """Tokens in the cache as the model counts them."""
    return 0 if cache is None else int(cache.get_seq_length())


def write(cache: Cache, layouts: dict[int, CacheLayout]) -> None:
    """Record what the layers hold after a reduced forward, and let them report the unreduced
    length."""
    for layer_index, layout in layouts.items():
        layer: Any = cache.layers[layer_index]
        if prompt_slots(layer):
            stock: Any = type(layer)
            layer.__class__ = _reduced_apart(stock)
            setattr(layer, _ATTRIBUTE, layout)
            layer._layer_type = APART  # by which its model finds it
            layer.prefill_length = layer.prefill_cumulative_length = layout.covered
            continue
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        layer.__class__ = ReducedSlidingLayer if sliding else ReducedDynamicLayer
        setattr(layer, _ATTRIBUTE, layout)
        if sliding:
            layer.cumulative_length = layout.covered
