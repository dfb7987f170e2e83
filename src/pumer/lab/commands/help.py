"""Help texts, built from the source of a command's function without importing anything heavy."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

FLAT = "settings"
"""Parameter of a command's function: a dataclass whose fields are the command's options."""
_ROOT = Path(__file__).parents[3]
_PLAIN = {
    "str": "TEXT",
    "int": "N",
    "Count": "N",
    "Index": "N",
    "float": "X",
    "Positive": "X",
    "Weight": "X",
    "Probability": "X",
    "bool": "true|false",
    "OutputFile": "FILE",
    "OutputFolder": "FOLDER",
    "NewFolder": "FOLDER",
}


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: with its prefix, as in `distill.teacher`.
        type: as annotated, with aliases of literals expanded.
        default: source text of the default; None if it is required.
        help: from the docstring.
    """

    name: str
    type: str
    default: str | None
    help: str


def options(path: str) -> list[Option]:
    """The options of a function, `module:name`, the fields of dataclasses among its parameters
    included.

    A parameter called `settings` is a dataclass whose fields are options of the command itself;
    fields of other dataclasses have the parameter's name as a prefix, as in `distill.teacher`.
    """
    module, _, name = path.partition(":")
    tree = _tree(module)
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    helps = _described(function)
    args = function.args.args + function.args.kwonlyargs
    missing: list[ast.expr | None] = [None] * (
        len(function.args.args) - len(function.args.defaults)
    )
    defaults = missing + list(function.args.defaults) + list(function.args.kw_defaults)
    result: list[Option] = []
    for argument, default in zip(args, defaults, strict=True):
        assert argument.annotation is not None
        annotation = ast.unparse(argument.annotation)
        if argument.arg == FLAT:
            result += _dataclass_options(tree, annotation)
        else:
            result += _option(tree, argument.arg, annotation, default, helps)
    return result


def _dataclass_options(tree: ast.Module, name: str) -> Iterator[Option]:
    """The options of a dataclass whose fields stand on the command line without a prefix."""
    source, definition = _definition(tree, name)
    assert isinstance(definition, ast.ClassDef)
    for base in definition.bases:
        yield from _dataclass_options(source, ast.unparse(base))
    helps = _described(definition)
    for field in _annotated(definition):
        yield from _option(
            source, field.target.id, ast.unparse(field.annotation), field.value, helps
        )


def _option(
    tree: ast.Module,
    name: str,
    annotation: str,
    default: ast.expr | None,
    helps: Mapping[str, str],
) -> Iterator[Option]:
    """An option, followed by the fields of the dataclass that its annotation names, if any."""
    nested = list(_fields(tree, annotation, name))
    type_ = "settings, one by one" if nested else _written_out(tree, annotation)
    shown = None if default is None else ast.unparse(default)
    yield Option(name, type_, shown, helps.get(name, ""))
    yield from nested


def render(command: str, what: str, path: str, positional: bool = False) -> str:
    """The help of a command."""
    width = min(shutil.get_terminal_size().columns, 110)
    command_options = options(path)
    required = [option for option in command_options if option.default is None]
    words = " ".join(option.name.upper() if positional else _typed(option) for option in required)
    lines = [" ".join(filter(None, [f"usage: pumer {command}", words, "[options]"])), ""]
    lines += [f"{what[0].upper()}{what[1:]}.", ""]
    for option in command_options:
        by_place = positional and option.default is None
        head = f"  {option.name}" if by_place else f"  --{option.name}"
        type_text = "" if option.type.startswith("settings") else f" {option.type}"
        silent = (
            not type_text
            or option.default in (None, "None")
            or str(option.default).startswith("field(")
        )
        default = "" if silent else f" (default {_shown(str(option.default))})"
        lines += [f"{head}{type_text}{default}"]
        lines += textwrap.wrap(
            option.help, width, initial_indent="      ", subsequent_indent="      "
        )
    lines += [
        "  --config FILE",
        "      YAML file with any of these settings"
        + ", or a recipe's name" * (command == "train"),
    ]
    lines += ["  --print_config", "      print all settings as they are, and stop"]
    return "\n".join(lines)


def _typed(option: Option) -> str:
    """A required option as it is typed; of nested settings at least one is required."""
    if option.type in ("settings, one by one", "{...}"):
        return f"--{option.name}.SETTING VALUE"
    return f"--{option.name} {option.name.upper()}"


def _shown(default: str) -> str:
    """A default in command-line syntax."""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return default
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tree(module: str) -> ast.Module:
    file = _ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _described(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """The `Args:` of a docstring, by name."""
    text = ast.get_docstring(node) or ""
    part = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    entries = re.split(r"^    (?=\w[\w, ]*: )", part[1] if part else "", flags=re.M)
    helps: dict[str, str] = {}
    for entry in entries[1:]:
        names, _, description = entry.partition(": ")
        helps |= {name.strip(): " ".join(description.split()) for name in names.split(",")}
    return helps


def _fields(tree: ast.Module, annotation: str, prefix: str) -> Iterator[Option]:
    """The fields of the dataclass named by an annotation, if it names one."""
    for name in re.findall(r"[A-Za-z_]\w*", annotation):
        source, definition = _definition(tree, name)
        if not isinstance(definition, ast.ClassDef):
            continue
        helps = _described(definition)
        for field in _annotated(definition):
            shown = "None" if field.value is None else ast.unparse(field.value)
            type_ = _written_out(source, ast.unparse(field.annotation))
            field_name = field.target.id
            yield Option(f"{prefix}.{field_name}", type_, shown, helps.get(field_name, ""))


class _Field(ast.AnnAssign):
    """An annotated assignment to a plain name."""

    target: ast.Name


def _annotated(definition: ast.ClassDef) -> Iterator[_Field]:
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield cast(_Field, node)


def _definition(tree: ast.Module, name: str) -> tuple[ast.Module, ast.AST | None]:
    """Find where a name is defined, in this module or in the one it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return tree, node
        if isinstance(node, ast.Assign) and any(
            isinstance(x, ast.Name) and x.id == name for x in node.targets
        ):
            return tree, node.value
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("pumer.")
            and any((alias.asname or alias.name) == name for alias in node.names)
        ):
            return _definition(_tree(str(node.module)), name)
    return tree, None


def _written_out(tree: ast.Module, annotation: str) -> str:
    """A type in command-line syntax: `Literal['a', 'b'] | None` is `a|b`."""
    parts = []
    for part in annotation.split(" | "):
        _, definition = _definition(tree, part)
        if isinstance(definition, ast.expr) and part.isidentifier() and part not in _PLAIN:
            part = _written_out(tree, ast.unparse(definition))
        annotated = re.match(r"Annotated\[(\w+),", part)
        if annotated is not None:
            part = annotated[1]
        literal = re.fullmatch(r"Literal\[(.*)\]", part)
        if literal is not None:
            part = "|".join(str(value) for value in ast.literal_eval(f"[{literal[1]}]"))
        if part.startswith("list["):
            part = f"[{_written_out(tree, part[5:-1])}, ...]"
        if part.startswith("dict"):
            part = "{...}"
        parts.append(_PLAIN.get(part, part))
    return "|".join(part for part in dict.fromkeys(parts) if part != "None")
