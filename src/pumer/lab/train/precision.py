"""Which precision a training has on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def in_bfloat16(trainer: Mapping[str, Any]) -> bool:
    """Whether a training computes in bfloat16: its settings ask for that, and the machine has such
    arithmetic.

    A CPU without it works it out number by number: a product of matrices takes 4 to 100 times as
    long as in float32.

    Args:
        trainer: settings of transformers' TrainingArguments.
    """
    on_cpu = trainer.get("use_cpu", not torch.cuda.is_available())
    return bool(trainer.get("bf16")) and not (on_cpu and _emulated())


def _emulated() -> bool:
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
