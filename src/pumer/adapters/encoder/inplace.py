"""Overwriting what nobody needs any more: half of a block's memory is results that live for one
operator.

Each steps aside where gradients or a compiler need the old value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _keeps() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def add(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum of a tensor that nobody else holds and another one."""
    return fresh + other if _keeps() or fresh.dtype != other.dtype else fresh.add_(other)


def activate(activation: Any, fresh: Tensor) -> Tensor:
    """An activation of a tensor that nobody else holds; exact GELU, the largest tensor of a layer,
    overwrites it."""
    if _keeps() or getattr(activation, "act", None) is not nn.functional.gelu:
        return activation(fresh)
    return torch.ops.aten.gelu_(fresh)
