"""Model families: the only code that touches modules of other libraries. Importing it registers
them."""

from pumer.adapters import cross, decoder  # noqa: F401
from pumer.adapters.base import Adapter, Patch
from pumer.adapters.encoder import bridgetower, meter, vilt  # noqa: F401
from pumer.adapters.families import find, is_supported, supported, unwrapped
from pumer.adapters.step import ReductionStep
from pumer.adapters.tower import alone  # noqa: F401

__all__ = ["Adapter", "Patch", "ReductionStep", "find", "is_supported", "supported", "unwrapped"]
