"""What families share whose encoder sees the image, and whose decoder writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pumer.adapters.cross.costs import CROSS
from pumer.adapters.cross.family import CrossAdapter
from pumer.adapters.decoder.parts import DEFAULT_TEXT


class WriterAdapter(CrossAdapter):
    """The layers are those of the decoder, which reads the encoder's output in every step."""

    def scopes(self, model: nn.Module) -> Sequence[tuple[nn.Module, str]]:
        return [(model, name) for name in ("forward", "generate") if hasattr(model, name)]

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        (reader,) = self.readers(model)
        return reading_layers(reader)

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        return DEFAULT_TEXT, rows * columns


def reading_layers(reader: nn.Module) -> list[nn.Module]:
    """The layers of a decoder with cross-attention.

    Raises:
        ValueError: if it has none.
    """
    stacks: Any = (part for part in reader.modules() if isinstance(part, nn.ModuleList))
    for stack in stacks:
        if any(hasattr(layer, name) for layer in stack for name in CROSS):
            return list(stack)
    raise ValueError(
        f"{type(reader).__name__} has no cross-attention, so that nothing reads the image: give a "
        "model whose decoder was built with add_cross_attention=True"
    )


def macs_of_run(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of a module for an input of this shape, counted while it runs on tensors
    without data."""
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    pixels = torch.empty(shape, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        functional_call(module, weights, (pixels,))
    return int(flops.get_total_flops()) // 2
