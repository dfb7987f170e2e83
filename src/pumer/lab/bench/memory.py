"""Peak activation memory of a call: what it holds beyond the weights and inputs.

On CUDA this is the allocator's peak (`max_memory_allocated`) minus what was allocated before. On a
CPU, whose allocator has no such counter, every tensor is tracked from the operator that creates it
until its memory is freed, and the result is the largest sum of their bytes. It depends only on
shapes and on the order of operators, so it is the same in every run. Scratch memory inside an
operator is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_activations(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak bytes that `call` holds beyond what was held before it.

    Results count while they are held, that is until the call returns. On CUDA run the call once
    before, or memory that libraries allocate on first use counts too.

    >>> peak_activations(lambda: torch.zeros(10) + torch.ones(10))
    120
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        call()
    return live.peak


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones counted once.

    >>> weight_bytes(nn.Linear(3, 2))
    32
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _LiveTensors(TorchDispatchMode):
    """Tracks the memory of every tensor that operators create; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        input_storages = {
            _storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                # Memory shared with an argument: a view of it, or an in-place result.
                if storage._cdata not in input_storages:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
