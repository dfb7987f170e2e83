"""Find the adapter of a model, inside any wrapper, or explain why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pumer._suggest import did_you_mean
from pumer.adapters.base import Adapter, adapter_of, adapters
from pumer.adapters.decoder import refused
from pumer.adapters.encoder import refused as joint

EXAMPLES = ("ViLT", "METER", "LLaVA 1.5", "Qwen-VL", "InternVL", "GLM-V", "Mistral 3", "Gemma 4")
"""Families that an error names, out of more than a line holds."""
WRAPPED = ("base_model", "module", "_orig_mod")
"""Attributes in which PEFT, (Distributed)DataParallel and torch.compile hold the wrapped model."""


def is_supported(model: nn.Module) -> bool:
    """Whether there is an adapter for a model."""
    return adapter_of(model) is not None


def find(model: nn.Module) -> Adapter:
    """The adapter of a model; raises ValueError with the supported families."""
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter
    name = type(model).__name__
    raise ValueError(
        f"{name} cannot be reduced.{_hint(model, name)}\n"
        f"Supported are {len(adapters())} families, such as {', '.join(EXAMPLES)}.\n"
        "All of them: `pumer list`, docs/models.md; a family of your own: docs/add-a-model.md"
    )


def _hint(model: Any, name: str) -> str:
    """What to pass instead of a model of an unsupported class."""
    reason = refused.reason(model) or joint.reason(model)
    if reason is not None:
        return f" {reason}"
    inner = _inside(model)
    if inner:
        return (
            f" It contains a {inner}: if it gives that pixel_values, pass that module, and see "
            "whether pumer.report says that it is active."
        )
    if isinstance(model, str):
        return " Give the model itself: from_pretrained or pumer.load reads it."
    return did_you_mean(name, {name for adapter in adapters() for name in adapter.classes})


def _inside(model: Any) -> str | None:
    if not isinstance(model, nn.Module):
        return None
    class_names = {name for adapter in adapters() for name in adapter.classes}
    inner = (type(module).__name__ for module in model.modules())
    return next((name for name in inner if name in class_names), None)


def supported(model: nn.Module) -> nn.Module:
    """The supported model inside any wrappers; the model itself where there is none."""
    return next((module for module in unwrapped(model) if is_supported(module)), model)


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """A model, the model that it wraps, and so on."""
    names: tuple[str, ...] = WRAPPED
    while isinstance(model, nn.Module):
        yield model
        name = next((name for name in names if name in model._modules), None)
        if name is None:
            return
        names = (
            (*WRAPPED, "model") if name == "base_model" else WRAPPED
        )  # PEFT's models hold a tuner that holds it
        model = model._modules[name]  # type: ignore[assignment]
