"""Benchmarks by name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from pumer._settings import check_settings
from pumer._suggest import did_you_mean
from pumer.lab.scenes.other_tasks import ScenesNLVR2, ScenesRetrieval, ScenesVE
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks.base import Task
from pumer.lab.tasks.nlvr import NLVR
from pumer.lab.tasks.nlvr2 import NLVR2
from pumer.lab.tasks.retrieval import Retrieval
from pumer.lab.tasks.snli_ve import SNLIVE
from pumer.lab.tasks.vqav2 import VQAv2

_TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        NLVR,
        NLVR2,
        SNLIVE,
        Retrieval,
        Scenes,
        ScenesNLVR2,
        ScenesRetrieval,
        ScenesVE,
        VQAv2,
    )
}


def get(name: str) -> type[Task]:
    """The task class of that name; raises ValueError listing the known ones."""
    if name not in _TASKS:
        hint = did_you_mean(name, _TASKS)
        raise ValueError(f"no task is named {name!r}.{hint} There are {', '.join(list_tasks())}")
    return _TASKS[name]


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(_TASKS)


def build(settings: Mapping[str, Any], labels: Sequence[str] = ()) -> Task:
    """Build a task from its `name` and settings, as in a recipe.

    `labels` are a model's own, for tasks whose vocabulary comes with the model. Raises ValueError
    for unknown tasks and settings, and for settings of another type.

    >>> build({"name": "scenes", "questions": 8}).questions
    8
    """
    task_settings = dict(settings)
    if "name" not in task_settings:
        raise ValueError(
            f"no task is named for the settings {', '.join(task_settings)}: name it, as in "
            '{"name": "vqav2", "root": "DIR"} or --task vqav2 --task.root DIR'
        )
    task_class = get(str(task_settings.pop("name")))
    field_names = [field.name for field in fields(task_class)]  # type: ignore[arg-type]  # every task is a dataclass
    unknown = sorted(set(task_settings) - set(field_names))
    if unknown:
        hint = did_you_mean(unknown[0], field_names)
        raise ValueError(
            f"task {task_class.name} has no setting {', '.join(unknown)}.{hint} It has "
            f"{', '.join(field_names)}"
        )
    if "labels" in field_names and labels:
        task_settings.setdefault("labels", tuple(labels))
    needed = [
        field.name
        for field in fields(task_class)  # type: ignore[arg-type]
        if field.default is MISSING
        and field.default_factory is MISSING
        and field.name not in task_settings
    ]
    if needed:
        example = json.dumps({"name": task_class.name, **dict.fromkeys(needed, "...")})
        raise ValueError(f"task {task_class.name} needs {', '.join(needed)}: give it as {example}")
    return task_class(**check_settings(task_class, task_settings, f"task {task_class.name}"))
