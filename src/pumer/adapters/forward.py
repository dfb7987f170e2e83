"""What the forward of a reduced model needs in every family: devices, autocast, inputs, padding,
timers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from pumer.reducers import Reducer

P = ParamSpec("P")
R = TypeVar("R")


def run_block(layer: Any, block: Callable[..., Any], *args: Any) -> Any:
    """Run `block(*args)` for a layer, under gradient checkpointing where the layer uses it."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(block, *args)
    return block(*args)


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module runs on; offloaded weights are on "meta" between calls."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def no_autocast(reducer: Reducer, device: torch.device) -> AbstractContextManager[Any]:
    """Leave the user's autocast, which would round a reducer's float32 products to half precision.

    Learned reducers stay under autocast, as their weights expect.
    """
    if reducer.traits.learned or not torch.amp.is_autocast_available(device.type):  # as on "meta"
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def exactly_one(**inputs: Tensor | None) -> Tensor:
    """The input that is given; raises ValueError unless it is exactly one."""
    inputs_set = [value for value in inputs.values() if value is not None]
    if len(inputs_set) != 1:
        raise ValueError(f"give exactly one of {' and '.join(inputs)}")
    return inputs_set[0]


def max_length(mask_BN: Tensor) -> Tensor:
    """Length of the longest row without its padding, as a tensor."""
    places = torch.arange(1, mask_BN.shape[1] + 1, device=mask_BN.device)
    return (places * mask_BN.bool()).max()


def timed(part: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose first argument is a patch, or has one: its calls are timed if
    the patch has a timer."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            patch: Any = getattr(args[0], "patch", args[0])
            if patch.timer is None:
                return function(*args, **kwargs)
            with patch.timing(part):
                return function(*args, **kwargs)

        return call

    return decorate
