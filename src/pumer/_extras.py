"""Optional packages: the extras of `pumer`."""

from __future__ import annotations

from importlib.util import find_spec


def need(what: str, extra: str, *packages: str) -> None:
    """Raise ValueError with installation instructions if packages of an extra are missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: {hint(extra)}")


def hint(extra: str) -> str:
    """How to install an extra; pumer is on no package index yet."""
    return f"install pumer with its extra {extra}, in a checkout by pip install '.[{extra}]'"
