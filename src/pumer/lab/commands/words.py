"""Check the words of a command line before it is parsed: mistyped names, settings given one by
one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml

from pumer._suggest import did_you_mean
from pumer._yaml import load_yaml, yaml_problem
from pumer.lab.commands.help import Option

NAMED = {"reducer": "reducer", "task": "name"}
"""Options that are a name, or a mapping that has the name under this key."""


def unknown_command(words: Sequence[str], commands: Collection[str]) -> str | None:
    """An error if the words do not begin with a command, else None."""
    spoken = [word for word in words[:2] if not word.startswith("-")]
    pair = " ".join(spoken)
    group = [name for name in commands if spoken and name.startswith(f"{spoken[0]} ")]
    grouped = len(spoken) == 2 and bool(group)
    if pair in commands or (spoken and spoken[0] in commands and not grouped):
        return None
    if group and not grouped:
        return (
            f"{spoken[0]!r} is a group of commands: give "
            f"{' or '.join(f'`pumer {name}`' for name in group)}"
        )
    name = pair if grouped else " ".join(spoken[:1])
    return f"there is no command {name!r}.{did_you_mean(name, commands)} `pumer --help` lists them"


def misplaced(
    words: Sequence[str], options: Sequence[Option], by_place: Sequence[str]
) -> str | None:
    """An error for the first word that the command does not accept, else None.

    Args:
        words: the words after the command's name.
        options: the command's.
        by_place: names of its positional arguments.
    """
    types = {"config": "FILE", "help": "", "print_config": ""} | {
        option.name: option.type for option in options
    }
    placed, given_names = 0, set[str]()
    for option, words_of_it in _options(words):
        name = option.removeprefix("--")
        if not option:
            placed += 1
            if problem := _alone(words_of_it[0], list(types), placed, by_place):
                return problem
        elif not _has(types, name):
            close = did_you_mean(name, types).replace(" '", " '--")
            return f"there is no option --{name}.{close} --help lists them"
        elif len(words_of_it) == 1 and name not in ("help", "print_config"):
            return f"--{name} has no value: write it behind, as `--{name} VALUE`"
        elif name in given_names and f"{name}s" in types:
            return f"--{name} is given twice: --{name}s takes a list"
        given_names.add(name)
    return None


def _alone(word: str, names: Sequence[str], placed: int, by_place: Sequence[str]) -> str | None:
    """An error for a word that is not an option's value, or None if it is a positional argument."""
    if re.match(r"-[A-Za-z]", word):
        close = did_you_mean(word.lstrip("-"), names).replace(" '", " '--")
        return f"there is no option {word}.{close} --help lists them"
    if placed <= len(by_place):
        return None
    wanted = (
        f"behind {' '.join(map(str.upper, by_place))} only options follow"
        if by_place
        else "options have names"
    )
    return f"{word!r} stands alone: {wanted}, as `--NAME VALUE`; --help lists them"


def _has(types: Mapping[str, str], name: str) -> bool:
    """Whether there is an option of this name, or one that takes settings of any name."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return name in types or any("{...}" in types.get(option, "") for option in above)


def with_settings(words: Sequence[str]) -> list[str]:
    """Merge `--reducer tome --reducer.depth 6` into one mapping, which is what commands take."""
    merged = list(words)
    for option, key in NAMED.items():
        merged = _merge(merged, f"--{option}", key)
    return merged


def _merge(words: list[str], option: str, key: str) -> list[str]:
    others: list[str] = []
    base: Any = None
    settings: list[tuple[list[str], Any]] = []
    insert_at = 0
    for name, words_of_it in _options(words):
        if name == option and len(words_of_it) == 2:
            base, insert_at = _value(*words_of_it), len(others)
        elif name.startswith(f"{option}.") and len(words_of_it) == 2:
            settings.append((name.removeprefix(f"{option}.").split("."), _value(*words_of_it)))
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
    return [*others[:insert_at], option, json.dumps(mapping), *others[insert_at:]]


def _value(option: str, text: str) -> Any:
    """Parse an option's value as YAML; raises ValueError for invalid YAML."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{option} {text}: {yaml_problem(error)}; close all brackets and quotes"
        ) from error


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
