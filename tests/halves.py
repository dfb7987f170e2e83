"""Sweeps of many alike cases: some run every time, the others with the slow half of the tests.

python -m pytest -m "not slow"  # without the slow half
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], every_time: Collection[Any] | Callable[[Any], bool]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, marked slow unless they are to run every time.

    A case is a value, or a `pytest.param` with an id, which then stands for it in `every_time`.
    """
    runs = every_time if callable(every_time) else every_time.__contains__
    return [case if runs(getattr(case, "id", case)) else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    if hasattr(case, "values") and hasattr(case, "marks"):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(case, marks=pytest.mark.slow)
