"""How long work tells those who wait for it how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of items that were finished since the last call."""
Log = Callable[[str], None]
"""Called with a message of one line."""


def no_progress(done: int) -> None:
    """The `Progress` of those who do not wait."""


def no_log(message: str) -> None:
    """The `Log` of those who do not read."""
