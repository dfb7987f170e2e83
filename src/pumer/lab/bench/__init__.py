"""Benchmarks: time, memory and overhead of stock, fused and reduced models."""

from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.results import Bench, Row
from pumer.lab.bench.run import bench
from pumer.lab.bench.settings import BenchSettings, SweepSettings
from pumer.lab.bench.sweep import Sweep, sweep
from pumer.lab.bench.timing import Timing, alternate

__all__ = [
    "Bench",
    "BenchSettings",
    "Row",
    "Sweep",
    "SweepSettings",
    "Timing",
    "alternate",
    "bench",
    "peak_activations",
    "sweep",
    "weight_bytes",
]
