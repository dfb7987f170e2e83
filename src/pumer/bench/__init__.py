"""Measurements: time, memory and overhead of stock, fused and reduced models, side by side."""

from pumer.bench.memory import peak_activations, weight_bytes
from pumer.bench.results import Bench, Row
from pumer.bench.run import bench
from pumer.bench.timing import Timing, alternate
from pumer.bench.where import Where, where

__all__ = ["Bench", "Row", "Timing", "Where", "alternate", "bench", "peak_activations", "weight_bytes", "where"]
