"""Parse and check a command line; errors are one line that says what to give."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from pumer._options import check_options
from pumer._suggest import did_you_mean
from pumer._yaml import read_yaml
from pumer.lab.commands.help import FLAT, Option
from pumer.lab.commands.words import misplaced, with_settings
from pumer.lab.train.recipe import RECIPES

_PARTS = {
    "TEXT": "text",
    "N": "a whole number",
    "X": "a number",
    "{...}": "settings such as {name: value}",
    "[N, ...]": "a list such as [1, 2]",
    "[X, ...]": "a list such as [0.1, 0.2]",
    "[true|false, ...]": "a list such as [true, false]",
    "[[N, ...], ...]": "a list such as [[1, 2], [3]]",
}


def parse(
    function: Callable[..., Any],
    options: Sequence[Option],
    words: Sequence[str],
    positional: bool,
    recipes: bool,
) -> dict[str, Any]:
    """The arguments of a command's function; runs nothing.

    Args:
        function: of the command.
        options: the command's, from `help.options`.
        words: the words after the command's name.
        positional: whether required arguments are positional.
        recipes: whether `--config` also takes the name of a shipped recipe.

    Raises:
        ValueError: for unknown options and invalid values.
    """
    required = [option.name for option in options if option.default is None]
    if (problem := misplaced(words, options, required if positional else [])) is not None:
        raise ValueError(problem)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    settings_class = get_type_hints(function).get(FLAT)
    if settings_class is not None:
        parser.add_class_arguments(settings_class, as_positional=positional)
    parser.add_function_arguments(function, as_positional=positional, skip={FLAT})
    files = [
        _config(word, recipes) if option == "--config" else word
        for option, word in pairwise(["", *words])
    ]
    try:
        parsed = parser.instantiate(parser.parse_args(with_settings(files)))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), options, positional)) from error
    values = {key: value for key, value in vars(parsed).items() if key != "config"}
    if settings_class is None:
        check_options(values, function)
        return values
    check_options(values, settings_class, function)
    names = {field.name for field in fields(settings_class)}
    own_options = {key: value for key, value in values.items() if key not in names}
    settings = settings_class(**{key: values[key] for key in names})
    return {FLAT: settings, **own_options}


def _config(name: str, recipes: bool) -> str:
    """The YAML file of a name; raises ValueError if there is none, or it has no settings."""
    shipped = RECIPES / f"{name}.yaml"
    if recipes and re.fullmatch(r"[\w-]+", name) and shipped.is_file():
        return str(shipped)
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder: give the YAML file in it")
    if not Path(name).exists():
        or_recipe = ", nor a recipe that `pumer list` names" if recipes else ""
        hint = did_you_mean(name, [path.stem for path in RECIPES.glob("*.yaml")]) if recipes else ""
        raise ValueError(f"{name} is no file{or_recipe}.{hint}")
    if not isinstance(read_yaml(Path(name)), dict):
        raise ValueError(f"{name} holds no settings: give them as lines of `name: value`")
    return name


def _explain(message: str, options: Sequence[Option], positional: bool) -> str:
    """An error of the parser as one line that says what to give."""
    by_name = {option.name: option for option in options}
    if missing := re.search(r"following arguments are required: (.*)", message):
        names = missing[1].split(", ")
        return f"give {' and '.join(name.upper() if positional else f'--{name}' for name in names)}"
    keys = list(dict.fromkeys(re.findall(r"(?:Parser key|Group) [\"']([\w.]+)[\"']", message)))
    if unknown := re.search(r"[Oo]ption '([\w.]+)'", message):
        name = ".".join([*keys, unknown[1]])
        return f"there is no setting {name}.{did_you_mean(name, by_name)} --help lists them"
    key = ".".join(keys)
    if any(name.startswith(f"{key}.") for name in by_name):
        fields = ", ".join(f"--{name}" for name in by_name if name.startswith(f"{key}."))
        return f"--{key} is a group of settings: give them one by one, {fields}"
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key in by_name and value is not None:
        nested = re.fullmatch(r"NestedArg\(.*val=(.*)\)", value[1])
        return (
            f"--{key} is {nested[1] if nested else value[1]}; give "
            f"{_expected(by_name[key].type, value[1])}"
        )
    return message


def _expected(type_: str, value: str) -> str:
    """What an option takes, given its type in the help."""
    parts = re.split(r"\|(?![^\[]*\])", type_)
    expected = [
        _PARTS.get(part, f"a list, as [{value}]" if part.startswith("[") else part)
        for part in parts
    ]
    *others, last = expected
    return f"{', '.join(others)} or {last}" if others else last
