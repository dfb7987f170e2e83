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
    """Give every plain linear layer, exact GELU and patch embedding inside `module` the faster forward."""
    for part in module.modules():
        if type(part) is nn.Linear:
            replace_forward(patch, part, linear)
        elif type(part) is GELUActivation and part.act is nn.functional.gelu:
            replace_forward(patch, part, gelu)
        elif type(part) is nn.Conv2d and _cuts_patches(part):
            replace_forward(patch, part, patches)


def linear(module: Any, x: Tensor) -> Tensor:
    """In place of `nn.Linear.forward`: oneDNN's matrix product on x86 CPUs in float32.

    Torch sends float32 products to MKL, which leaves AVX-512 unused on AMD's processors: oneDNN takes half the time
    there, and adds the bias in the same pass everywhere.
    """
    weight, bias = module.weight, module.bias
    if _plain(x, weight) and x.numel() * weight.shape[0] >= WORTH_IT:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def patches(module: Any, x: Tensor) -> Tensor:
    """In place of `nn.Conv2d.forward` where the kernel is as large as the stride: then it is a matrix product."""
    if not _plain(x, module.weight):
        return nn.Conv2d.forward(module, x)
    batch, channels, height, width = x.shape
    high, wide = module.kernel_size
    rows, columns = height // high, width // wide
    cut = x[:, :, : rows * high, : columns * wide].reshape(batch, channels, rows, high, columns, wide)
    flat = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * columns, channels * high * wide)
    out = torch.ops.mkldnn._linear_pointwise(flat, module.weight.flatten(1), module.bias, "none", [], "")
    return out.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def _cuts_patches(module: nn.Conv2d) -> bool:
    plain = module.padding in ((0, 0), "valid") and module.dilation == (1, 1) and module.groups == 1
    return plain and module.kernel_size == module.stride


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
