"""Measurements: time, memory and overhead of stock, fused and reduced models, side by side."""

from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.results import Bench, Row
from pumer.lab.bench.run import bench
from pumer.lab.bench.timing import Timing, alternate
from pumer.lab.bench.where import Where, where

__all__ = [
    "Bench",
    "Row",
    "Timing",
    "Where",
    "alternate",
    "bench",
    "peak_activations",
    "weight_bytes",
    "where",
]
