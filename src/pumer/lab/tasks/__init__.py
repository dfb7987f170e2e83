"""Benchmarks by name.

Names are imported on first use, because some tasks live in packages that need this one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pumer.lab.scenes.other_tasks import ScenesNLVR2, ScenesRetrieval, ScenesVE
    from pumer.lab.scenes.tasks import Scenes
    from pumer.lab.tasks.base import Collator, Example, Task
    from pumer.lab.tasks.nlvr import NLVR
    from pumer.lab.tasks.nlvr2 import NLVR2
    from pumer.lab.tasks.registry import build, get, list_tasks
    from pumer.lab.tasks.retrieval import Retrieval
    from pumer.lab.tasks.snli_ve import SNLIVE
    from pumer.lab.tasks.vqav2 import VQAv2

__all__ = [
    "NLVR",
    "NLVR2",
    "SNLIVE",
    "Collator",
    "Example",
    "Retrieval",
    "Scenes",
    "ScenesNLVR2",
    "ScenesRetrieval",
    "ScenesVE",
    "Task",
    "VQAv2",
    "build",
    "get",
    "list_tasks",
]

_FROM = {
    "pumer.lab.scenes.other_tasks": ("ScenesNLVR2", "ScenesRetrieval", "ScenesVE"),
    "pumer.lab.scenes.tasks": ("Scenes",),
    "pumer.lab.tasks.base": ("Collator", "Example", "Task"),
    "pumer.lab.tasks.nlvr": ("NLVR",),
    "pumer.lab.tasks.nlvr2": ("NLVR2",),
    "pumer.lab.tasks.registry": ("build", "get", "list_tasks"),
    "pumer.lab.tasks.retrieval": ("Retrieval",),
    "pumer.lab.tasks.snli_ve": ("SNLIVE",),
    "pumer.lab.tasks.vqav2": ("VQAv2",),
}
_MODULES = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
