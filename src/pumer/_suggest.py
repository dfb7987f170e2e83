"""Names in errors: which one was meant, and the first few of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown name; empty if no name is close.

    >>> did_you_mean("tomee", ["tome", "pumer"])
    " Did you mean 'tome'?"
    """
    by_lower = {option.lower(): option for option in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def some(names: Iterable[object], shown: int = 12) -> str:
    """The first names, and how many more there are; sets are sorted.

    >>> some(["a", "b", "c"], shown=2)
    'a, b and 1 more'
    """
    texts = [str(name) for name in (sorted(names) if isinstance(names, set) else names)]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more
