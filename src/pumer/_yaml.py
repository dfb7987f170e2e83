"""Read YAML of others, bounding the size of expanded aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST = 100_000
"""Most values that settings may have once their aliases are written out."""


def load_yaml(text: str) -> Any:
    """Parse a text with YAML's safe loader.

    Raises yaml.YAMLError, also for a text whose aliases expand to more than `LARGEST` values or
    endlessly: such a text loads at once, but stops whatever traverses the result.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}) > LARGEST:
            raise yaml.YAMLError(f"its aliases make more than {LARGEST:,} values: write it without")
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or in itself") from None
    return yaml.safe_load(text)


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; raises ValueError for one that cannot be read or parsed."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {yaml_problem(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a YAML file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML, it is not text in UTF-8: give a YAML file") from error


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).strip().splitlines()[0]
    mark = error.problem_mark
    hint = ", indent with spaces" if "'\\t'" in str(error.problem) else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{hint}"


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values of a node with its aliases expanded; visits each node once."""
    if id(node) not in sizes:
        sizes[id(node)] = LARGEST + 1  # what it counts for inside itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
