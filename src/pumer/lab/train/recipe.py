"""Recipes: YAML files with the settings of `pumer train`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pumer._files import replacing
from pumer._yaml import read_yaml

RECIPES = Path(__file__).parent / "recipes"
"""The shipped ones."""


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, given a shipped one's name or a file; raises ValueError if there is
    none."""
    shipped = RECIPES / f"{name}.yaml"
    return read_settings(shipped if shipped.is_file() else Path(name))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ValueError for a missing or empty file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


# --- the recipe in a training's output folder ---

WRITTEN = "recipe.yaml"
"""Its file name."""
_MAY_CHANGE = tuple(
    f"trainer.{name}"
    for name in (
        *(
            "max_steps",
            "num_train_epochs",
            "logging_",
            "log_",
            "save_",
            "eval_",
            "report_to",
            "run_name",
        ),
        *(
            "disable_tqdm",
            "load_best_model",
            "metric_for_best",
            "greater_is_better",
            "per_device_eval",
        ),
        *(
            "dataloader_num_workers",
            "dataloader_pin",
            "dataloader_prefetch",
            "use_cpu",
            "ddp_",
            "hub_",
            "push_to",
        ),
    )
)
"""Settings of duration, logging and saving, which may change on resume: none affects a step."""


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the settings of a training as a recipe that reproduces it."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WRITTEN) as file:
        yaml.safe_dump(_plain(recipe), file, sort_keys=False)


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Raise ValueError naming the settings that differ from those a training began with, or if
    these are unknown."""
    if not (folder / WRITTEN).is_file():
        if any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"{folder} has checkpoints but no {WRITTEN}, so their settings are unknown: "
                "restore that file, or give another --output"
            )
        return
    before, now = dict(_flat(read_settings(folder / WRITTEN))), dict(_flat(_plain(recipe)))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if others := [
        name for name in names if not name.startswith((*_MAY_CHANGE, "eval_split", "distill.cache"))
    ]:
        changes = "; ".join(
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in others[:_LISTED]
        )
        more = f"; and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise ValueError(
            f"the training in {folder} began with other settings ({changes}{more}): resume "
            f"with those in its {WRITTEN}, or give another --output"
        )


_LISTED = 6


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as YAML holds them, without tuples, paths and dataclasses."""
    plain: dict[str, Any] = json.loads(
        json.dumps(recipe, default=lambda x: getattr(x, "__dict__", None) or str(x))
    )
    return plain


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, without those that are None."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None:
            yield f"{above}{name}", value
