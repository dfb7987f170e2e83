"""Types of command options that are checked before anything is computed."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pumer._files import check_file, check_folder


@dataclass(frozen=True)
class Checked:
    """Marks an annotation; `check` raises ValueError for invalid values."""

    check: Callable[[Any], None]


def _check_count(value: int) -> None:
    if value < 1:
        raise ValueError(f"give a whole number from 1, not {value}")


def _check_index(value: int) -> None:
    if value < 0:
        raise ValueError(f"give a whole number from 0, not {value}")


def _check_positive(value: float) -> None:
    if not value > 0:
        raise ValueError(f"give a number above 0, for example 1, not {value}")


def _check_weight(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"give a number from 0, not {value}")


def _check_probability(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"give a probability, more than 0 and less than 1, not {value}")


def _check_new(path: str) -> None:
    check_folder(path, empty=True)


Count = Annotated[int, Checked(_check_count)]
Index = Annotated[int, Checked(_check_index)]
Positive = Annotated[float, Checked(_check_positive)]
Weight = Annotated[float, Checked(_check_weight)]
Probability = Annotated[float, Checked(_check_probability)]
OutputFile = Annotated[str, Checked(check_file)]
OutputFolder = Annotated[str, Checked(check_folder)]
NewFolder = Annotated[str, Checked(_check_new)]


def check_options(values: Mapping[str, Any], *targets: Callable[..., Any]) -> None:
    """Check a command's options, and the fields of dataclasses among them.

    Args:
        values: by option.
        targets: functions and dataclasses whose annotations are `Checked`.

    Raises:
        ValueError: naming the option; also for a file to write that another option names too.
    """
    hints: dict[str, Any] = {}
    for target in targets:
        hints |= get_type_hints(target, include_extras=True)
    _check_all(hints, values, "--")
    paths = {
        name: os.path.realpath(value)
        for name, value in values.items()
        if value and isinstance(value, str)
    }
    for name in paths:
        same = [other for other in paths if other != name and paths[other] == paths[name]]
        if same and check_file in _checks(hints.get(name)):
            raise ValueError(
                f"--{name} and --{same[0]} are the same file: give --{name} another one"
            )


def check_values(target: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check values for the parameters of a function or the fields of a dataclass, recursively.

    Raises:
        ValueError: naming the first invalid one, after the prefix.
    """
    _check_all(get_type_hints(target, include_extras=True), values, prefix)


def _check_all(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    for name, value in values.items():
        for check in _checks(hints.get(name)) if value is not None else ():
            for part in value if isinstance(value, list | tuple) else [value]:
                try:
                    check(part)
                except ValueError as error:
                    raise ValueError(f"{prefix}{name}: {error}") from None
        if is_dataclass(value):
            check_values(type(value), vars(value), f"{prefix}{name}.")


def _checks(hint: Any) -> list[Callable[[Any], None]]:
    """The checks of a value, or of each item of a list."""
    if get_origin(hint) is Annotated:
        return [mark.check for mark in hint.__metadata__ if isinstance(mark, Checked)]
    if get_origin(hint) in (Union, types.UnionType, list):
        return [check for part in get_args(hint) for check in _checks(part)]
    return []
