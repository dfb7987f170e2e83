"""Model families: the only code that touches modules of other libraries. Importing it registers
them."""

from pumer.adapters import decoder  # noqa: F401
from pumer.adapters.base import Adapter, Patch, ReductionStep
from pumer.adapters.encoder import bridgetower, meter, vilt  # noqa: F401
from pumer.adapters.families import find, is_supported, supported, unwrapped

__all__ = ["Adapter", "Patch", "ReductionStep", "find", "is_supported", "supported", "unwrapped"]
