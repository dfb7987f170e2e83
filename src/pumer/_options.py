"""Options of commands that are checked before anything is computed, by the way their arguments are annotated."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pumer._files import check_file, check_folder


@dataclass(frozen=True)
class Checked:
    """Mark of an argument; `check` raises ValueError for a value that cannot be."""

    check: Callable[[Any], None]


def _check_count(value: int) -> None:
    if value < 1:
        raise ValueError(f"give a whole number from 1, not {value}")


def _check_new(path: str) -> None:
    check_folder(path, empty=True)


Count = Annotated[int, Checked(_check_count)]
OutputFile = Annotated[str, Checked(check_file)]
OutputFolder = Annotated[str, Checked(check_folder)]
NewFolder = Annotated[str, Checked(_check_new)]


def check_options(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check the arguments for a function whose annotations are `Checked`; raises ValueError naming the option."""
    hints = get_type_hints(function, include_extras=True)
    for name, value in values.items():
        for check in _checks(hints.get(name)) if value is not None else ():
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None


def _checks(hint: Any) -> list[Callable[[Any], None]]:
    if get_origin(hint) is Annotated:
        return [mark.check for mark in hint.__metadata__ if isinstance(mark, Checked)]
    if get_origin(hint) in (Union, types.UnionType):
        return [check for part in get_args(hint) for check in _checks(part)]
    return []
