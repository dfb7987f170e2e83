"""The registry: reducers by name, and as plain data."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, TypeVar

from pumer import _plugins
from pumer._settings import check_settings
from pumer._suggest import did_you_mean
from pumer.reducers.base import Reducer

_REDUCERS: dict[str, type[Reducer]] = {}

R = TypeVar("R", bound=type[Reducer])


def register(reducer: R) -> R:
    """Class decorator: register a reducer under its `name`."""
    if reducer.name in _REDUCERS:
        raise ValueError(f"a reducer named {reducer.name!r} is registered already")
    _REDUCERS[reducer.name] = reducer
    return reducer


def get(name: str) -> type[Reducer]:
    """The reducer class of that name, built in or of a plugin; raises ValueError with the names
    there are.

    Example:
        >>> from pumer.reducers import get
        >>> get("fastv")(keep=0.25)
        FastV(keep=0.25, layer=2)
    """
    if not is_reducer(name):
        names = list_reducers()
        raise ValueError(
            f"no reducer is named {name!r}.{did_you_mean(name, names)} There are {', '.join(names)}"
        )
    return _REDUCERS[name]


def is_reducer(name: str) -> bool:
    """Whether there is a reducer of that name; plugins are loaded only if none is built in."""
    return name in _REDUCERS or name in list_reducers()


def _register_plugin(plugin: Any) -> None:
    """Accepts a reducer class, or a module that registers its reducers on import."""
    if isinstance(plugin, ModuleType) or plugin in _REDUCERS.values():
        return
    if not (isinstance(plugin, type) and issubclass(plugin, Reducer)):
        raise TypeError(f"{plugin!r} is no subclass of pumer.Reducer")
    register(plugin)


def list_reducers() -> list[str]:
    """Names of all reducers, those of plugins included, sorted.

    Example:
        >>> from pumer.reducers import list_reducers
        >>> list_reducers()[:3]
        ['cdpruner', 'chain', 'compose']
    """
    _plugins.load(_plugins.REDUCERS, _register_plugin)
    return sorted(_REDUCERS)


def to_dict(reducer: Reducer) -> dict[str, Any]:
    """A reducer as plain data: its name and settings, without `Reducer.added` at their defaults.

    Example:
        >>> from pumer.reducers import to_dict
        >>> to_dict(pumer.FastV(keep=0.25))
        {'reducer': 'fastv', 'keep': 0.25, 'layer': 2}
    """
    usual = {field.name: field.default for field in dataclasses.fields(reducer)}
    settings = {
        name: value
        for name, value in reducer.settings().items()
        if name not in reducer.added or value != usual[name]
    }
    return {"reducer": reducer.name, **settings}


def from_dict(data: dict[str, Any]) -> Reducer:
    """The reducer from the data of `to_dict`; raises ValueError for unknown names, settings and
    types.

    Example:
        >>> from pumer.reducers import from_dict
        >>> from_dict({"reducer": "fastv", "keep": 0.25})
        FastV(keep=0.25, layer=2)
    """
    settings = {key: _read(value) for key, value in data.items()}
    cls = get(str(settings.pop("reducer", None)))
    settings = cls.upgraded(settings)
    field_names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(settings) - set(field_names)):
        hint = did_you_mean(unknown[0], field_names)
        raise ValueError(
            f"{cls.name} has no setting {', '.join(unknown)}.{hint} It has "
            f"{', '.join(field_names) or 'no settings'}"
        )
    settings = check_settings(cls, settings, f"reducer {cls.name}")
    try:
        return cls(**settings)
    except TypeError as error:  # of a setting that is missing
        raise ValueError(f"the settings {settings} do not fit {cls.name}: {error}") from error


def _read(value: Any) -> Any:
    """A setting from JSON: lists as tuples, and reducers inside reducers."""
    if isinstance(value, list):
        return tuple(_read(part) for part in value)
    return from_dict(value) if isinstance(value, dict) else value
