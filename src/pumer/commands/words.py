"""What stands on the command line, before it is parsed: names that were mistyped, and settings given one by one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import yaml

from pumer._suggest import did_you_mean

NAMED = {"reducer": "reducer", "task": "name"}
"""Options that are a name, or a mapping that has the name under this key."""


def unknown_command(words: Sequence[str], commands: Collection[str]) -> str | None:
    """What is wrong with the command that the words begin with; None if there is such a command."""
    spoken = [word for word in words[:2] if not word.startswith("-")]
    pair = " ".join(spoken)
    grouped = len(spoken) == 2 and any(name.startswith(f"{spoken[0]} ") for name in commands)
    if pair in commands or (spoken and spoken[0] in commands and not grouped):
        return None
    name = pair if grouped else " ".join(spoken[:1])
    return f"there is no command {name!r}.{did_you_mean(name, commands)} `pumer --help` lists them"


def unknown_option(words: Sequence[str], options: Collection[str]) -> str | None:
    """What is wrong with the first option that a command does not have; None if it has them all."""
    for word in words:
        name = word.removeprefix("--").partition("=")[0].partition(".")[0]
        if word.startswith("--") and name and name not in options:
            close = did_you_mean(name, options).replace(" '", " '--")
            return f"there is no option --{name}.{close} --help lists them"
    return None


def with_settings(words: Sequence[str]) -> list[str]:
    """`--reducer tome --reducer.depth 6` as one mapping, which is what the commands take."""
    merged = list(words)
    for option, key in NAMED.items():
        merged = _merge(merged, f"--{option}", key)
    return merged


def _merge(words: list[str], option: str, key: str) -> list[str]:
    others: list[str] = []
    base: Any = None
    settings: list[tuple[list[str], Any]] = []
    place = 0
    for name, words_of_it in _options(words):
        if name == option and len(words_of_it) == 2:
            base, place = yaml.safe_load(words_of_it[1]), len(others)
        elif name.startswith(f"{option}.") and len(words_of_it) == 2:
            settings.append((name.removeprefix(f"{option}.").split("."), yaml.safe_load(words_of_it[1])))
        else:
            others += words_of_it
    if base is None or not settings:
        return words
    mapping = dict(base) if isinstance(base, dict) else {key: base}
    for path, value in settings:
        inner = mapping
        for part in path[:-1]:
            before = inner.get(part, {})
            # A reducer inside a reducer may be given by its name, too.
            inner[part] = dict(before) if isinstance(before, dict) else {key: before}
            inner = inner[part]
        inner[path[-1]] = value
    return [*others[:place], option, json.dumps(mapping), *others[place:]]


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every option with its value, and every other word by itself under an empty name."""
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            yield "", [word]
        elif equals:
            yield name, [name, value]
        elif remaining and not remaining[0].startswith("--"):
            yield name, [name, remaining.pop(0)]
        else:
            yield name, [name]
