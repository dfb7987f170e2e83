"""`pumer list`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pumer.adapters.base import adapters
from pumer.presets import PRESETS, SHIPPED, shipped_models
from pumer.reducers import get, list_reducers
from pumer.tasks import get as get_task
from pumer.tasks import list_tasks


def list_() -> None:
    """List reducers, presets, supported model classes, tasks and shipped models."""
    console = Console()
    for title, rows in {
        "reducers": {name: _first_line(get(name)) for name in list_reducers()},
        "presets": {name: repr(reducer) for name, reducer in PRESETS.items()},
        "models": {adapter.family: ", ".join(adapter.classes) for adapter in adapters()},
        "tasks": {name: _first_line(get_task(name)) for name in list_tasks()},
        "shipped models": {name: str(SHIPPED / name) for name in shipped_models()},
    }.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, what in rows.items():
            table.add_row(name, what)
        console.print(table)
        console.print()


def _first_line(thing: type) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
