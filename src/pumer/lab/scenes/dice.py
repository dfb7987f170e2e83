"""Random numbers that depend on a seed, an image's number and a slot alone.

Shape suffixes: B images.
"""

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as the int64 that torch accepts."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _MIX_1, _MIX_2 = (
    _signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al., 2014). torch's int64 shift keeps the sign, hence the
    masks."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


class Dice:
    """Non-negative 31-bit hashes of (seed, index, slot); every call takes the next free slots."""

    def __init__(self, seed: int, index_B: Tensor):
        seed_ = torch.tensor(_signed(seed), device=index_B.device)
        self.state_B = _mix(_mix(seed_ * _GOLDEN + 1) ^ _mix(index_B * _GOLDEN + 2))
        self.used = 0

    def roll(self, *shape: int) -> Tensor:
        """int64 [B, *shape]; take `% n` for a number below n."""
        count = math.prod(shape)
        slot = torch.arange(self.used + 1, self.used + count + 1, device=self.state_B.device)
        self.used += count
        hashed = _mix(self.state_B[:, None] + slot * _GOLDEN)
        return ((hashed >> 33) & (2**31 - 1)).view(-1, *shape)
