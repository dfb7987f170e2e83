"""A stock attention module's queries and keys, and its arguments for fewer tokens.

The module keeps its own kernel: queries and keys are captured in transformers' attention interface
on their way to it, so they are the ones it uses, after norms and rotary embeddings.

Shape suffixes: B samples, H heads, Q queries, K keys, L keys as the model counts them, C channels
of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pumer.adapters.base import Patch

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
NORMALIZER = "normalizer"
_PREFIX = "pumer_"
_inside: ContextVar[bool] = ContextVar("pumer_inside_attention", default=False)
"""Whether a captured module's own kernel runs, which reads the module's configuration too."""

OnQK = Callable[[Tensor, Tensor, dict[str, Any]], None]


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


def capture_qk(
    patch: Patch, attention: nn.Module, on_qk: OnQK, where: str = "", normalizer: bool = False
) -> None:
    """Call `on_qk(queries [B,H,Q,C], keys [B,h,K,C], options)` whenever an attention module of
    transformers has run.

    Args:
        patch: that undoes it.
        attention: the module.
        on_qk: gets queries and keys whose products over sqrt(C) are the logits, detached;
            `options` are the keyword arguments of the kernel.
        where: as for `check_backend`.
        normalizer: whether the options are to have `NORMALIZER`, the log-sum-exp [B,H,Q] of every
            query's logits, where the kernel gives it.
    """
    check_backend(attention.config, where)
    registry = _registry()
    for name in BACKENDS:
        registry.register(_PREFIX + name, _attend)
    patch.set(attention, "config", _CapturingConfig(attention.config, on_qk, where, normalizer))


class _CapturingConfig:
    """A module's configuration, except that its attention runs through `_attend`."""

    def __init__(self, config: Any, on_qk: OnQK, where: str, normalizer: bool) -> None:
        self.config, self.on_qk, self.where, self.normalizer = config, on_qk, where, normalizer

    @property
    def _attn_implementation(self) -> str:
        name: str = self.config._attn_implementation
        if _inside.get():
            return name
        check_backend(self.config, self.where)  # it may have been changed since
        return _PREFIX + name

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "on_qk", "where", "normalizer"):  # missing while it is being copied
            raise AttributeError(name)
        return getattr(self.config, name)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The module's own attention, whose queries and keys are then handed to `on_qk`."""
    capturing = module.config
    name = capturing.config._attn_implementation
    attend: Any = _eager(module) if name == "eager" else _registry()[name]
    token = _inside.set(True)
    try:
        if name == "sdpa" and capturing.normalizer and not torch.compiler.is_compiling():
            with LogSumExp() as sums:
                output = attend(module, query, key, value, *args, **kwargs)
            kwargs = kwargs | {NORMALIZER: sums.normalizer_BHQ}
        else:
            output = attend(module, query, key, value, *args, **kwargs)
    finally:
        _inside.reset(token)
    capturing.on_qk(*normalize_qk_scale(module, query, key, kwargs.get("scaling")), kwargs)
    return output


def normalize_qk_scale(
    attention: Any, queries: Tensor, keys: Tensor, scaling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products over sqrt(C) are the layer's logits, whatever it scales by,
    detached. `scaling` is what its kernel was told."""
    if scaling is None:
        scaling = attention.scaling if hasattr(attention, "scaling") else attention.scale
    factor = scaling * queries.shape[-1] ** 0.5
    queries = queries.detach()
    return queries if abs(factor - 1) < 1e-6 else queries * factor, keys.detach()


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


def slice_attention_mask(
    mask: Any,
    rows_BQ: Tensor | None,
    columns_BK: Tensor,
    filled_BK: Tensor | None,
    offset: int,
    first: int,
    queries: int,
    backend: str,
    dtype: torch.dtype,
    causal: bool = True,
) -> Any:
    """The rows and columns of an attention mask that belong to the tokens left.

    Args:
        mask: the stock one: [B,1,Q,L] (bool or added to the logits), [B,L] as flash attention takes
            it, or None where the kernel's own rule is enough.
        rows_BQ: index of the queries left; None for all.
        columns_BK: positions of the keys left, as the model counts them.
        filled_BK: bool, false for empty slots among these keys; None where there are none.
        offset: position of the mask's first key, beyond 0 where a sliding window has passed.
        first: position of the mask's first query.
        queries: number of the mask's queries.
        backend: the layer's attention.
        dtype: of the layer.
        causal: whether the kernel's own rule is that a token sees those before it, or all.
    """
    if mask is None:
        if filled_BK is None or backend.startswith("flash"):
            return filled_BK
        if not causal:
            return _as(filled_BK[:, None, None], backend, dtype)
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


def gather_tokens(x: Any, index_BK: Tensor, length: int) -> Any:
    """The tokens with these indices of anything that has one entry for each; other things as they
    are.

    Takes [B,S], [B,S,D], rotary embeddings as tuples of such, and positions of several kinds
    [P,B,S]; a batch of one serves all samples.
    """
    if isinstance(x, tuple):
        return tuple(gather_tokens(part, index_BK, length) for part in x)
    if not isinstance(x, Tensor):
        return x
    batch = len(index_BK)
    index = index_BK.to(x.device)
    if x.shape[-1] == length and x.ndim >= 2 and x.dtype in (torch.int64, torch.int32):
        wide = (*x.shape[:-2], batch, index.shape[1])
        return x.expand(*x.shape[:-2], batch, length).gather(-1, index.expand(wide))
    if x.ndim == 3 and x.shape[1] == length:
        return x.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return x


_FLASH = 1
"""`torch.nn.attention.SDPBackend.FLASH_ATTENTION`, as `torch._fused_sdp_choice` says it."""


class LogSumExp(TorchFunctionMode):
    """Inside the with block, keep the log-sum-exp of fused attention on a CPU; its output stays
    bit-equal.

    A few columns of an attention map are the exponentials of their logits less this number, so no
    second pass over all the keys is needed.

    Args:
        normalizer_BHQ: float32, of the last call; None where its kernel does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalizer_BHQ: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.normalizer_BHQ = None
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
        if (
            kernel is None
            or query.device.type != "cpu"
            or torch._fused_sdp_choice(*arguments, **options) != _FLASH
        ):
            return F.scaled_dot_product_attention(*arguments, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # As torch itself does it before this kernel.
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = bias.masked_fill_(~attn_mask, -torch.inf)
        output, normalizer = kernel(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        self.normalizer_BHQ = normalizer.detach().view(query.shape[:3])
        return output
