"""What a stock attention module is asked and told: its queries and keys, and masks for fewer
tokens.

The module keeps its own kernel: queries and keys are seen through transformers' attention interface
on their way to it, so they are the ones it uses, with rotary embeddings and norms on.

Shape suffixes: B samples, H heads, Q queries, K keys, L keys as the model counts them, C channels
of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder.log_sum_exp import LogSumExp

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
NORMALIZER = "normalizer"
_PREFIX = "pumer_"
_inside: ContextVar[bool] = ContextVar("pumer_inside_attention", default=False)
"""Whether a watched module's own kernel runs, which reads the module's configuration too."""

Seen = Callable[[Tensor, Tensor, dict[str, Any]], None]


def check_backend(config: Any, where: str = "") -> None:
    """Raise ValueError if the model's attention is none that is supported.

    Args:
        config: of the model whose attention it is.
        where: which of a model's parts that is, as `set_attn_implementation` names it; "" for all.
    """
    name = config._attn_implementation
    if name not in BACKENDS:
        part = f'{{"{where}": ...}}' if where else "..."
        raise ValueError(
            f"attention {name!r}{f' of the {where}' if where else ''} cannot be given fewer tokens "
            f"or looked into: call model.set_attn_implementation({part}) first, with one of "
            f"{', '.join(BACKENDS)}"
        )
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    sliding = getattr(config, "sliding_window", None) and "sliding_attention" in kinds
    if sliding and name.startswith("flash"):
        raise ValueError(
            "flash attention counts its sliding window in tokens that are left, the model in "
            "tokens of the prompt: "
            'call model.set_attn_implementation("sdpa") first'
        )


def watch(
    patch: Patch, attention: nn.Module, seen: Seen, where: str = "", normalizer: bool = False
) -> None:
    """Call `seen(queries [B,H,Q,C], keys [B,h,K,C], options)` whenever an attention module of
    transformers has run.

    Args:
        patch: what takes it off again.
        attention: the module.
        seen: is told; `options` are the keyword arguments that its kernel gets.
        where: as for `check_backend`.
        normalizer: whether the options are to have `NORMALIZER`, the log-sum-exp [B,H,Q] of every
            query's logits, where the kernel gives it.
    """
    check_backend(attention.config, where)
    registry = _registry()
    for name in BACKENDS:
        registry.register(_PREFIX + name, _attend)
    patch.set(attention, "config", _Watched(attention.config, seen, where, normalizer))


class _Watched:
    """A module's configuration, except that its attention goes by way of `_attend`."""

    def __init__(self, config: Any, seen: Seen, where: str, normalizer: bool) -> None:
        self.config, self.seen, self.where, self.normalizer = config, seen, where, normalizer

    @property
    def _attn_implementation(self) -> str:
        name: str = self.config._attn_implementation
        if _inside.get():
            return name
        check_backend(self.config, self.where)  # it may have been changed since
        return _PREFIX + name

    def __getattr__(self, name: str) -> Any:
        if name in (
            "config",
            "seen",
            "where",
            "normalizer",
        ):  # not there yet while it is being copied
            raise AttributeError(name)
        return getattr(self.config, name)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The module's own attention, into which somebody has a look."""
    watched = module.config
    name = watched.config._attn_implementation
    attend: Any = _eager(module) if name == "eager" else _registry()[name]
    token = _inside.set(True)
    try:
        if name == "sdpa" and watched.normalizer and not torch.compiler.is_compiling():
            with LogSumExp() as sums:
                output = attend(module, query, key, value, *args, **kwargs)
            kwargs = kwargs | {NORMALIZER: sums.normalizer_BHQ}
        else:
            output = attend(module, query, key, value, *args, **kwargs)
    finally:
        _inside.reset(token)
    watched.seen(query, key, kwargs)
    return output


def _registry() -> Any:
    """transformers' attention functions; a file that takes seconds to import, and that every model
    has imported."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _eager(module: nn.Module) -> Any:
    """The plain attention in the file of the module's class; wrappers of other libraries have
    none."""
    for cls in type(module).__mro__:
        eager_forward = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager_forward is not None:
            return eager_forward
    raise ValueError(f"{type(module).__name__} has no eager attention: use sdpa")


def cut_mask(
    mask: Any,
    rows_BQ: Tensor | None,
    columns_BK: Tensor,
    filled_BK: Tensor | None,
    offset: int,
    first: int,
    queries: int,
    backend: str,
    dtype: torch.dtype,
) -> Any:
    """An attention mask for the tokens that are left.

    Args:
        mask: the stock one: [B,1,Q,L] (bool or added to the logits), [B,L] as flash attention takes
            it, or None where the kernel's own causal rule is enough.
        rows_BQ: which of the mask's queries are left; None for all.
        columns_BK: places of the keys that are left, as the model counts them.
        filled_BK: bool, false for empty slots among these keys; None where there are none.
        offset: place of the mask's first key: later than 0 where a sliding window has passed.
        first: place of the mask's first query.
        queries: number of the mask's queries.
        backend: the layer's attention.
        dtype: of the layer.
    """
    if mask is None:
        if filled_BK is None or backend.startswith("flash"):
            return filled_BK
        rows = torch.arange(queries, device=columns_BK.device)[None] if rows_BQ is None else rows_BQ
        visible_BQK = (columns_BK[:, None] <= first + rows[..., None]) & filled_BK[:, None]
        return _as(visible_BQK[:, None], backend, dtype)
    device = mask.device
    columns = columns_BK.to(device) - offset
    hidden = None if offset == 0 else columns < 0
    if filled_BK is not None:
        empty = ~filled_BK.to(device)
        hidden = empty if hidden is None else hidden | empty
    columns = columns.clamp_min(0)
    if mask.ndim == 2:
        cut = mask.expand(len(columns), -1).gather(1, columns)
        return cut if hidden is None else cut.masked_fill(hidden, 0)
    cut = mask.expand(len(columns), -1, -1, -1)
    heads = cut.shape[1]
    if rows_BQ is not None:
        rows = rows_BQ.to(device)[:, None, :, None].expand(-1, heads, -1, cut.shape[3])
        cut = cut.gather(2, rows)
    cut = cut.gather(3, columns[:, None, None].expand(-1, heads, cut.shape[2], -1))
    if hidden is None:
        return cut
    nothing = False if cut.dtype == torch.bool else torch.finfo(cut.dtype).min
    return cut.masked_fill(hidden[:, None, None], nothing)


def _as(visible_BHQK: Tensor, backend: str, dtype: torch.dtype) -> Tensor:
    if backend != "eager":
        return visible_BHQK
    return torch.zeros(visible_BHQK.shape, dtype=dtype, device=visible_BHQK.device).masked_fill(
        ~visible_BHQK, torch.finfo(dtype).min
    )
