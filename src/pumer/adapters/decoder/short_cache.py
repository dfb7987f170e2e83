"""A cache whose layers all hold the same tokens, fewer than the model has counted: what a prompt
leaves that was made shorter before the language model (`shorten`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prompt import current_state


class ShortCache(DynamicCache):
    """A cache whose layers all hold fewer tokens than the model has counted; layers that keep a
    state hold what has come of these tokens."""

    _pumer_layout: kv_cache.CacheLayout

    def _hidden(self) -> int:
        """Tokens that whoever asks counts, and that are not here."""
        state = current_state()
        return 0 if state is not None and state.in_language else self._pumer_layout.missing

    def get_seq_length(self, layer_idx: int = 0) -> int:
        num_held = super().get_seq_length(layer_idx)
        return num_held + self._hidden() if num_held else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        _check_reducer()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length + self._hidden(), offset

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        _check_reducer()
        return super().get_conv_state(*args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        _check_reducer()
        return super().update(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many tokens as the model counts them: those of them that are here."""
        layout, counted = self._pumer_layout, self.get_seq_length()
        self._pumer_layout, tokens_to_remove = layout.cropped(counted, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        del self._pumer_layout
        self.__class__ = DynamicCache  # type: ignore[assignment]
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


def _check_reducer() -> None:
    """Raise ValueError where a model without a reducer asks."""
    if current_state() is None:
        raise ValueError(kv_cache.NEEDS_REDUCER)


def check(cache: Any) -> None:
    """Raise ValueError for a cache that cannot hold fewer tokens than were counted."""
    if cache is not None and type(cache) not in (DynamicCache, ShortCache):
        raise ValueError(
            f"a reduced model fills its cache to another length than the prompt's, which "
            f"{type(cache).__name__} cannot hold: "
            "leave cache_implementation unset, for transformers' DynamicCache"
        )


def write(cache: Any, layout: kv_cache.CacheLayout) -> None:
    """Record what all layers hold after a reduced forward, and let the cache report the unreduced
    length."""
    cache.__class__ = ShortCache
    cache._pumer_layout = layout
