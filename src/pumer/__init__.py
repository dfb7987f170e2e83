"""Token reduction for vision-language models: fewer image and text tokens, the same answers, about
twice the speed."""

# Names are imported when they are first asked for: `pumer --help` and the like need no torch.
import importlib
from typing import TYPE_CHECKING, Any

from pumer._version import __version__

if TYPE_CHECKING:
    from pumer.api import active, apply, kept, reduced, remove, trace, vectors
    from pumer.costs.report import report
    from pumer.costs.result import Report
    from pumer.hub import load, load_official, save, save_official
    from pumer.hub.callback import PumerCallback
    from pumer.reducers import (
        DART,
        SCOPE,
        VTW,
        CDPruner,
        Chain,
        Compose,
        DivPrune,
        DyMU,
        DynamicViT,
        Energy,
        FasterVLM,
        FastV,
        FoPru,
        HiPrune,
        HoloV,
        MMTok,
        NoVision,
        Plan,
        Pool,
        PruMerge,
        PuMer,
        PyramidDrop,
        Random,
        Reducer,
        SmartTrim,
        SparseVLM,
        SVDPrune,
        ToMe,
        Uniform,
        Unreduced,
        V2Drop,
        VisionZip,
        VisPruner,
    )

_FROM = {
    "pumer.api": ("active", "apply", "kept", "reduced", "remove", "trace", "vectors"),
    "pumer.costs.report": ("report",),
    "pumer.costs.result": ("Report",),
    "pumer.hub": ("load", "load_official", "save", "save_official"),
    "pumer.hub.callback": ("PumerCallback",),
    "pumer.lab.tasks.inputs": ("processor",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        # A submodule, such as `pumer.presets`.
        try:
            return importlib.import_module(f"pumer.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"pumer.{name}":
                raise
            raise AttributeError(f"module 'pumer' has no attribute {name!r}") from None
    module = next((module for module, names in _FROM.items() if name in names), "pumer.reducers")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "DART",
    "SCOPE",
    "VTW",
    "CDPruner",
    "Chain",
    "Compose",
    "DivPrune",
    "DyMU",
    "DynamicViT",
    "Energy",
    "FastV",
    "FasterVLM",
    "FoPru",
    "HiPrune",
    "HoloV",
    "MMTok",
    "NoVision",
    "Plan",
    "Pool",
    "PruMerge",
    "PuMer",
    "PumerCallback",
    "PyramidDrop",
    "Random",
    "Reducer",
    "Report",
    "SVDPrune",
    "SmartTrim",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "Unreduced",
    "V2Drop",
    "VisPruner",
    "VisionZip",
    "__version__",
    "active",
    "apply",
    "kept",
    "load",
    "load_official",
    "processor",
    "reduced",
    "remove",
    "report",
    "save",
    "save_official",
    "trace",
    "vectors",
]
