"""Recipes of trainings: YAML files of settings of `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pumer._yaml import read_yaml

RECIPES = Path(__file__).parent / "recipes"
"""The shipped ones."""


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, a shipped one's name or a file; raises ValueError for a file that holds none."""
    shipped = RECIPES / f"{name}.yaml"
    return read_settings(shipped if shipped.is_file() else Path(name))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ValueError if there is no such file, or no settings in it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings
