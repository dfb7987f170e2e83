"""The active patch of a model."""

from __future__ import annotations

from torch import nn

from pumer.adapters.base import Patch
from pumer.adapters.families import unwrapped

PATCH = "_pumer_patch"
"""Attribute of a reduced model that holds its patch."""


def patched_module(model: nn.Module) -> nn.Module | None:
    """The module that carries the patch: the model itself, or what a wrapper around it wraps."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in unwrapped(model) if PATCH in vars(module)), None)


def active(model: nn.Module) -> Patch | None:
    """The patch of this model with its reducer, None if it is not reduced.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.ToMe(r=16))
        >>> pumer.active(model).reducer.r
        16
    """
    patched = patched_module(model)
    return None if patched is None else vars(patched)[PATCH]
