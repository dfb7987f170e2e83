"""In-place operators: half of a block's memory is results that only the next operator reads.

Each falls back to the normal operator where gradients or a compiler need the old value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _keeps() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def add(fresh: Tensor, other: Tensor) -> Tensor:
    """`fresh + other`, in place in `fresh`, which nothing else may hold."""
    return fresh + other if _keeps() or fresh.dtype != other.dtype else fresh.add_(other)


def quick_gelu(activation: Any, fresh: Tensor) -> Tensor:
    """`QuickGELUActivation` of `fresh`, which nothing else may hold."""
    if _keeps():
        return activation(fresh)
    return fresh.mul_(torch.sigmoid_(1.702 * fresh))


def activate(activation: Any, fresh: Tensor) -> Tensor:
    """The activation of `fresh`, which nothing else may hold.

    Exact GELU, on the largest tensor of a layer, is in place.
    """
    if _keeps() or getattr(activation, "act", None) is not nn.functional.gelu:
        return activation(fresh)
    return torch.ops.aten.gelu_(fresh)
