"""Names that were mistyped: which one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that goes behind an error about an unknown name; empty where no name is close to
    it."""
    by_lower = {option.lower(): option for option in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
