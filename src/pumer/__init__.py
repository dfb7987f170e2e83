"""Token reduction for vision-language models: fewer image and text tokens, the same answers, about twice the speed."""

from pumer._version import __version__
from pumer.api import active, apply, reduced, remove, trace
from pumer.hub import load, load_official, save, save_official
from pumer.reducers import Compose, NoVision, Plan, Pool, PuMer, Random, Reducer, ToMe, Uniform, Unreduced
from pumer.report import Report, report

__all__ = [
    "Compose",
    "NoVision",
    "Plan",
    "Pool",
    "PuMer",
    "Random",
    "Reducer",
    "Report",
    "ToMe",
    "Uniform",
    "Unreduced",
    "__version__",
    "active",
    "apply",
    "load",
    "load_official",
    "reduced",
    "remove",
    "report",
    "save",
    "save_official",
    "trace",
]
