"""YAML of others: plain data alone, and not more of it than the file seems to hold."""

from __future__ import annotations

from typing import Any

import yaml

_MOST = 100_000


def read_yaml(text: str) -> Any:
    """The data in a YAML text.

    Raises:
        yaml.YAMLError: if it is none; for tags that would make objects; if its aliases, which are short to write,
            stand for more than 100,000 values or for themselves.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node stands for, those behind its aliases each time that they are named."""
    if id(node) not in counted:
        counted[id(node)] = _MOST  # of a node within itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in nodes)
        if counted[id(node)] > _MOST:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST} values")
    return counted[id(node)]
