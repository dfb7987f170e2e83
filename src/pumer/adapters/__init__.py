"""Model knowledge: the only place that touches a foreign module."""

from pumer.adapters import internvl as internvl
from pumer.adapters import llava as llava
from pumer.adapters import meter as meter
from pumer.adapters import paligemma as paligemma
from pumer.adapters import qwen_vl as qwen_vl
from pumer.adapters import smolvlm as smolvlm
from pumer.adapters import vilt as vilt
from pumer.adapters.base import Adapter, Patch, Step
from pumer.adapters.families import find, is_supported, supported, unwrapped

__all__ = ["Adapter", "Patch", "Step", "find", "is_supported", "supported", "unwrapped"]
