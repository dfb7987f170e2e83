"""The log-sum-exp of every query's logits, from the kernel that the layer runs anyway.

A few columns of an attention map are the exponentials of their logits less this number, so that
nobody has to go over all the keys a second time.

Shape suffixes: B samples, H heads, Q queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLASH = 1
"""`torch.nn.attention.SDPBackend.FLASH_ATTENTION`, as `torch._fused_sdp_choice` says it."""


class LogSumExp(TorchFunctionMode):
    """Inside the with block fused attention on a CPU tells what it sums up; its output stays the
    same, bit for bit.

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
        kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
        if (
            kernel is None
            or query.device.type != "cpu"
            or torch._fused_sdp_choice(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            != _FLASH
        ):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if (
            attn_mask is not None and attn_mask.dtype == torch.bool
        ):  # as torch itself does it on the way there
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = bias.masked_fill_(~attn_mask, -torch.inf)
        output, normalizer = kernel(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        self.normalizer_BHQ = normalizer.detach().view(query.shape[:3])
        return output
