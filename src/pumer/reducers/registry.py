"""Reducers by name."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from pumer._settings import check_settings
from pumer.reducers.base import Reducer

_REDUCERS: dict[str, type[Reducer]] = {}

R = TypeVar("R", bound=type[Reducer])


def register(reducer: R) -> R:
    """Class decorator: make a reducer known by its `name`."""
    if reducer.name in _REDUCERS:
        raise ValueError(f"a reducer named {reducer.name!r} is registered already")
    _REDUCERS[reducer.name] = reducer
    return reducer


def get(name: str) -> type[Reducer]:
    """The reducer class of that name; raises ValueError listing the known ones."""
    if name not in _REDUCERS:
        raise ValueError(f"no reducer is named {name!r}; there are {', '.join(list_reducers())}")
    return _REDUCERS[name]


def list_reducers() -> list[str]:
    """Names of all reducers, sorted."""
    return sorted(_REDUCERS)


def to_dict(reducer: Reducer) -> dict[str, Any]:
    """A reducer as plain data: its name and settings."""
    return {"reducer": reducer.name, **reducer.settings()}


def from_dict(data: dict[str, Any]) -> Reducer:
    """The reducer that `to_dict` described; raises ValueError for unknown names, settings and types."""
    settings = {key: _read(value) for key, value in data.items()}
    kind = get(str(settings.pop("reducer", None)))
    settings = kind.upgraded(settings)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{kind.name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(**check_settings(kind, settings, f"reducer {kind.name}"))


def _read(value: Any) -> Any:
    """A setting as it was before JSON: tuples, and reducers inside reducers."""
    if isinstance(value, list):
        return tuple(_read(part) for part in value)
    return from_dict(value) if isinstance(value, dict) else value
