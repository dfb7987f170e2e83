"""What comes with the package: small trained models, sample photographs."""

from __future__ import annotations

import os
from pathlib import Path

from pumer._suggest import did_you_mean

SHIPPED = Path(__file__).parent / "assets"
"""Folder of all of it."""


def model_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, or the name of a shipped one; raises ValueError if there is
    neither."""
    for folder in (Path(model), SHIPPED / model):
        if (folder / "config.json").is_file():
            return folder
    names = shipped_models()
    has_none = (
        " It has no config.json."
        if Path(model).is_dir()
        else " It is a file."
        if Path(model).exists()
        else ""
    )
    raise ValueError(
        f"{model} is no model folder.{has_none or did_you_mean(str(model), names)} Shipped models "
        f"are {', '.join(names)}"
    )


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
