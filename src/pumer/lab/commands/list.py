"""`pumer list`."""

from __future__ import annotations

import itertools

from rich.table import Table

from pumer._shipped import SHIPPED, shipped_models
from pumer._terminal import console
from pumer.adapters.base import adapters
from pumer.lab.tasks import get as get_task
from pumer.lab.tasks import list_tasks
from pumer.lab.train.recipe import RECIPES
from pumer.presets import PRESETS
from pumer.reducers import get, list_reducers


def list_() -> None:
    """List reducers, presets, supported model classes, tasks, recipes and shipped models."""
    screen = console()
    for title, rows in {
        "reducers": {name: _first_line(get(name)) for name in list_reducers()},
        "presets": {name: repr(reducer) for name, reducer in PRESETS.items()},
        "models": {adapter.family: ", ".join(adapter.classes) for adapter in adapters()},
        "tasks": {name: _first_line(get_task(name)) for name in list_tasks()},
        "recipes of trainings, for `pumer train --config`": {
            path.stem: _first_sentence(path.read_text(encoding="utf-8"))
            for path in sorted(RECIPES.glob("*.yaml"))
        },
        "shipped models": {name: str(SHIPPED / name) for name in shipped_models()},
    }.items():
        table = Table(
            title=title, title_justify="left", show_header=False, box=None, padding=(0, 2)
        )
        for name, what in rows.items():
            table.add_row(name, what)
        screen.print(table)
        screen.print()


def _first_sentence(recipe: str) -> str:
    """The first sentence of a recipe's comment."""
    comment = itertools.takewhile(
        lambda line: line.startswith("# ") and line[2:3] != " ", recipe.splitlines()
    )
    return (
        " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0].rstrip(".") + "."
    )


def _first_line(thing: type) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
