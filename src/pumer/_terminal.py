"""Print text of others safely to a terminal."""

from __future__ import annotations

import unicodedata
from typing import Any

_OBEYED = ("Cc", "Cs", "Zl", "Zp")  # control codes, halves of pairs, ends of lines
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_LINES = 5


def visible(text: str) -> str:
    """The text with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    obeyed = unicodedata.category(char) in _OBEYED or unicodedata.bidirectional(char) in _DIRECTIONS
    return char.encode("unicode_escape").decode() if obeyed and char not in "\n\t" else char


def brief(text: str) -> str:
    """The first lines of a text, and how many more there are."""
    lines = visible(text).splitlines()
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"... and {len(lines) - _LINES + 1} more lines"]
    return "\n".join(lines)


def console(**settings: Any) -> Any:
    """A rich Console that does not interpret markup or escape sequences in text."""
    from rich.console import Console
    from rich.text import Text

    class SafeConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **options)

    return SafeConsole(markup=False, **settings)
