"""Check settings from YAML, JSON or a command line against the types of fields and parameters."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

_YAML_WORDS = " (YAML reads yes, no, on and off as true and false: put the words in quotes)"


def check_settings(target: Any, settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Convert settings to the types of a dataclass's fields, or of a function's parameters.

    YAML and JSON have lists where a field is a tuple, and PyYAML reads 1e-4 as text: these are
    converted. An int is accepted for a float and stays an int. Names without an annotation are not
    checked.

    Args:
        target: the dataclass or the function.
        settings: by name.
        what: names the settings in errors, for example "task vqav2".

    Raises:
        ValueError: naming the first setting of another type, its value and the expected type.
    """
    hints = _hints(target)
    checked = {}
    for name, value in settings.items():
        try:
            checked[name] = _conform(value, hints.get(name, Any))
        except _FieldError as error:
            raise ValueError(f"{what}: {name}.{error}") from None
        except _MismatchError:
            hint = _YAML_WORDS if _has_bool(value) and "str" in _text(hints[name]) else ""
            raise ValueError(
                f"{what}: {name} is {value!r}; expected {_text(hints[name])}{hint}"
            ) from None
    return checked


P = ParamSpec("P")
R = TypeVar("R")


def typed(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that checks a function's arguments as settings before it is called."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            settings = inspect.signature(function).bind(*args, **kwargs).arguments
            return function(**check_settings(function, settings, what))  # type: ignore[call-arg]

        return call

    return decorate


class _MismatchError(Exception):
    """A value of another type than expected."""


class _FieldError(_MismatchError):
    """The same in a field of a nested dataclass; the message begins with the field's name."""


class _Nested(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, parameters: Any) -> Any:
        return cls


class _Anything(metaclass=_Nested):
    """Stands for a type that cannot be resolved, such as `torch` in `torch.dtype`; accepts every
    value."""


@functools.cache
def _hints(target: Any) -> dict[str, Any]:
    """Types of fields or parameters by name, `_Anything` where they cannot be resolved."""
    names: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(target, localns=names)
        except NameError as error:  # a name that is imported for type checkers alone
            names[str(error.name)] = _Anything


def _text(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(f"{member.value} ({member.name.lower()})" for member in hint)
    text = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
    if get_origin(hint) is not None:
        text = str(hint)
    for prefix in ("typing.", "collections.abc.", "pathlib.", "NoneType"):
        text = text.replace(prefix, "None" if prefix == "NoneType" else "")
    return text


def _has_bool(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, bool) for part in parts)


def _conform(value: Any, hint: Any, convert: bool = True) -> Any:
    """The value converted to a type; raises _MismatchError. `convert`: text may be read as a
    number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, _Anything) or isinstance(hint, str | typing.TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _conform_union(value, arguments, convert)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
        raise _MismatchError
    if hint is None or hint is types.NoneType:
        return _require(value is None, value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _conform_dataclass(value, hint)
    if isinstance(origin, type):
        return _conform_container(value, origin, arguments, convert)
    if typing.is_typeddict(hint):
        return _require(isinstance(value, Mapping), value)
    if isinstance(hint, type):
        return _conform_plain(value, hint, convert)
    return value


def _conform_union(value: Any, options: tuple[Any, ...], convert: bool) -> Any:
    # Text stays text where text is one of the options; only then it may be read as a number.
    field_error = None
    for reading in (False, True) if convert else (False,):
        for option in options:
            try:
                return _conform(value, option, reading)
            except _FieldError as error:
                field_error = error
            except _MismatchError:
                continue
    raise field_error or _MismatchError


def _conform_dataclass(value: Any, cls: Any) -> Any:
    if not isinstance(value, cls):
        raise _MismatchError
    for field in dataclasses.fields(cls):
        current = getattr(value, field.name)
        hint = _hints(cls).get(field.name, Any)
        try:
            conformed = _conform(current, hint)
        except _FieldError as error:
            raise _FieldError(f"{field.name}.{error}") from None
        except _MismatchError:
            raise _FieldError(f"{field.name} is {current!r}; expected {_text(hint)}") from None
        if conformed != current or type(conformed) is not type(current):
            value = dataclasses.replace(value, **{field.name: conformed})
    return value


def _conform_container(value: Any, origin: Any, arguments: tuple[Any, ...], convert: bool) -> Any:
    if issubclass(origin, collections.abc.Mapping):
        key_hint, value_hint = arguments
        items = _require(isinstance(value, Mapping), value).items()
        pairs = (
            (_conform(k, key_hint, convert), _conform(v, value_hint, convert)) for k, v in items
        )
        return dict(pairs)
    if issubclass(origin, type) or not issubclass(origin, collections.abc.Collection):
        return value
    _require(isinstance(value, list | tuple | set | frozenset), value)
    hints = list(arguments)
    if origin is not tuple or arguments[-1:] == (...,):
        hints = [arguments[0]] * len(value)
    _require(len(hints) == len(value), value)
    parts = [_conform(part, hint, convert) for part, hint in zip(value, hints, strict=True)]
    if origin in (tuple, list, set, frozenset):
        return origin(parts)
    return parts if isinstance(value, list) else tuple(parts)


def _conform_plain(value: Any, expected_type: type, convert: bool) -> Any:
    if expected_type in (int, float) and isinstance(value, str) and convert:
        try:
            return expected_type(value)
        except ValueError:
            raise _MismatchError from None
    if expected_type is float:
        return _require(isinstance(value, int | float) and not isinstance(value, bool), value)
    if expected_type is int:
        return _require(isinstance(value, int) and not isinstance(value, bool), value)
    if expected_type is Path:
        return _require(isinstance(value, str | Path), value)
    if issubclass(expected_type, Enum):
        same = (
            member
            for member in expected_type
            if member == value or (member.value, type(member.value)) == (value, type(value))
        )
        member = None if isinstance(value, bool) else next(same, None)
        return _require(member is not None, member)
    return _require(isinstance(value, expected_type), value)


def _require(condition: bool, value: Any) -> Any:
    if not condition:
        raise _MismatchError
    return value
