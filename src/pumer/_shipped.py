"""The package's data: small trained models and sample photographs."""

from __future__ import annotations

import os
from pathlib import Path

from pumer._suggest import did_you_mean

SHIPPED = Path(__file__).parent / "assets"
"""The folder of the data."""


def model_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model.

    Args:
        model: a path, or the name of a shipped model.

    Raises:
        ValueError: if the path has no `config.json` and no shipped model has the name.

    >>> model_folder("scenes-vilt").name
    'scenes-vilt'
    """
    for folder in (Path(model), SHIPPED / model):
        if (folder / "config.json").is_file():
            return folder
    names = shipped_models()
    if Path(model).is_dir():
        hint = " It has no config.json."
    elif Path(model).exists():
        hint = " It is a file."
    else:
        hint = did_you_mean(str(model), names)
    raise ValueError(f"{model} is not a model folder.{hint} Shipped models are {', '.join(names)}")


def shipped_models() -> list[str]:
    """Names of the shipped models.

    >>> shipped_models()
    ['scenes-vilt', 'scenes-vilt-pumer']
    """
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
