"""Faster ways to compute what stock modules compute, with weights as they are.

They stand in for the `forward` of plain layers while the fused attention is in force, and step aside for whatever
they do not know: gradients, autocast, compilers, quantised weights.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.activations import GELUActivation

from pumer.adapters.base import Patch, replace_forward

WORTH_IT = 2**20
"""Multiply-accumulates from which oneDNN's product is the faster one; below, setting it up costs more."""


def install(patch: Patch, module: nn.Module) -> None:
    """Give every plain linear layer and exact GELU inside `module` the faster forward."""
    for part in module.modules():
        if type(part) is nn.Linear:
            replace_forward(patch, part, linear)
        elif type(part) is GELUActivation and part.act is nn.functional.gelu:
            replace_forward(patch, part, gelu)


def linear(module: Any, x: Tensor) -> Tensor:
    """In place of `nn.Linear.forward`: oneDNN's matrix product on x86 CPUs in float32.

    Torch sends float32 products to MKL, which leaves AVX-512 unused on AMD's processors: oneDNN takes half the time
    there, and adds the bias in the same pass everywhere.
    """
    weight, bias = module.weight, module.bias
    if _plain(x, weight) and x.numel() * weight.shape[0] >= WORTH_IT:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def gelu(module: Any, x: Tensor) -> Tensor:
    """In place of `GELUActivation.forward`: overwrites its input, the largest tensor of a layer, if nothing needs it.

    What comes in is the fresh output of a linear layer.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nn.functional.gelu(x)
    return torch.ops.aten.gelu_(x)


def add(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum of a tensor that nobody else holds and another one; the first is overwritten if nothing needs it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return fresh + other
    return fresh.add_(other)


_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _plain(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # Who watches operators, such as torch's FLOP counter, is to see those it knows.
        and not is_in_torch_dispatch_mode()
    )
