"""What layers cost that keep a state in place of keys, or beside them: linear attention, state
spaces, short convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

DELTA_RULE = 3
"""Multiply-accumulates of one number of a state by the delta rule: what the key recalls, what is
written, and what the query reads."""
WRITE_AND_READ = 2


def step_macs(module: Any) -> int:
    """Multiply-accumulates by which a token goes through the state of a module, step by step; 0 for
    modules without. Kernels that take tokens by the chunk spend more."""
    if hasattr(module, "head_k_dim"):  # gated delta rule
        return DELTA_RULE * int(module.num_v_heads * module.head_k_dim * module.head_v_dim)
    if hasattr(module, "forget_gate"):  # Kimi's delta attention
        return DELTA_RULE * int(module.num_heads * module.head_dim**2)
    if hasattr(module, "ssm_state_size"):  # Mamba 2
        return WRITE_AND_READ * int(module.num_heads * module.head_dim * module.ssm_state_size)
    if hasattr(module, "static_weight"):  # a convolution whose weights depend on the token
        return int(module.static_weight.numel())
    return 0


def state_macs(layer: nn.Module) -> int:
    """Multiply-accumulates of a token in all states and short convolutions of a layer."""
    convolutions = (part for part in layer.modules() if isinstance(part, nn.Conv1d))
    return sum(map(step_macs, layer.modules())) + sum(part.weight.numel() for part in convolutions)
