"""Models on disk and on the Hub: pumer's own folders, and published checkpoints.

Weights are read from safetensors files, or from torch files with `weights_only=True`; code in a
file never runs.
"""

from pumer.hub.folders import is_stock, load, load_stock, model_class
from pumer.hub.official import Official, load_official, read_official, save_official
from pumer.hub.saving import save

__all__ = [
    "Official",
    "is_stock",
    "load",
    "load_official",
    "load_stock",
    "model_class",
    "read_official",
    "save",
    "save_official",
]
