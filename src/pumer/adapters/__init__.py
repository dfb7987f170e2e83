"""Model knowledge: the only place that touches a foreign module."""

from pumer.adapters import meter as meter
from pumer.adapters import vilt as vilt
from pumer.adapters.base import Adapter, Patch, Step, find

__all__ = ["Adapter", "Patch", "Step", "find"]
