"""Reducers and model families of other packages, found by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

REDUCERS = "pumer.reducers"
MODELS = "pumer.models"
_loading: set[str] = set()


def load(group: str, register: Callable[[Any], None]) -> None:
    """Import and register a group of entry points, once per process.

    They are only read when a name is not one of pumer's own, so that plugins do not slow down
    `import pumer`. A plugin that fails is skipped with a warning.

    Args:
        group: `REDUCERS` or `MODELS`.
        register: called with the object of each entry point.
    """
    if group not in _loading:  # a plugin that is being imported may ask for names, too
        _loading.add(group)
        for name, value, distribution, read in _entries(group):
            try:
                register(read())
            except Exception as error:  # whatever somebody else's module raises
                warnings.warn(
                    f"the plugin {name!r} ({value}, of {distribution}) in {group} is left out: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=3,
                )


def _entries(group: str) -> list[tuple[str, str, str, Callable[[], Any]]]:
    """(name, value, distribution, loader) of every entry point, sorted."""
    return sorted(
        (
            (
                entry.name,
                entry.value,
                entry.dist.name if entry.dist else "an unknown package",
                entry.load,
            )
            for entry in entry_points(group=group)
        ),
        key=lambda entry: entry[:3],
    )
