"""Our reducers against outputs of their published code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from selector_parity import Case, load, names

MODULES = sorted(
    path.stem for path in (Path(__file__).parents[1] / "reference").glob("parity_*.py")
)
RUNNERS: dict[str, Callable[[Case], None]] = {
    method: run
    for module in MODULES
    for method, run in importlib.import_module(module).RUNNERS.items()
}
CASES = [
    pytest.param(method, name, id=f"{method}-{name}")
    for method in sorted(RUNNERS)
    for name in names(method)
]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_equals_published_code(method: str, name: str) -> None:
    """What is kept, and what merged tokens become, is what the published code gave."""
    RUNNERS[method](load(method, name))
