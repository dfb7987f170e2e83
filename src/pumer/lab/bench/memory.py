"""Peak activation memory of one call: what it holds beyond the weights and inputs that were there
before.

On CUDA this is the allocator's own peak (`max_memory_allocated`) less what was allocated at the
start. On a CPU, whose allocator keeps no such account, every tensor that the call makes is followed
from the operator that made it until its memory is freed, and the largest sum of their bytes at any
moment is the answer. It depends on shapes and on the order of operators alone, so it is the same
number in every run. Scratch memory inside one operator is not seen.
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
    """Bytes that `call` holds at its peak beyond what was held before it.

    Its results count as long as they are held, which they are until it returns. On CUDA run the
    call once before, or what libraries set aside at their first use counts too.
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
    """Bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _LiveTensors(TorchDispatchMode):
    """Follows the memory of every tensor that operators make while it is on; `peak` is the most
    there was at once."""

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
                # What shares memory with an argument is a view of it or was written in place.
                if storage._cdata not in input_storages:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
