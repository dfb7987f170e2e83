"""Modules that read a memory by cross-attention, and get what is left of it.

A memory is what an encoder gives, a reader is what looks at it: a Q-former, a resampler, or a
writer. The reader's `forward` is wrapped: it gets fewer tokens, and its mask cut to them. The
encoder's output stays whole for everybody else. In decoding a memory is read once a step; it is
reduced the first time.

Shape suffixes: B rows of a memory, L its tokens, D channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.cross import memory as memories
from pumer.adapters.cross.memory import Memories, MemoryImages, Remaining
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.spec import TowerSpec
from pumer.adapters.decoder.vision import VisionCapture

Inputs = dict[str, Any]
Reading = Callable[[Inputs], Any]
"""The stock reader, called with its arguments by name."""
_scope: ContextVar[tuple[Any, Inputs] | None] = ContextVar("pumer_cross_scope", default=None)


class CrossSpec(TowerSpec, Protocol):
    """A family as its readers see it; `family.CrossAdapter` says what each member is."""

    memory: ClassVar[str]
    mask: ClassVar[str | None]
    wide_mask: ClassVar[bool]

    def scopes(self, model: nn.Module) -> Sequence[tuple[nn.Module, str]]: ...
    def readers(self, model: nn.Module) -> Sequence[nn.Module]: ...
    def images(
        self, readers: Readers, memory_BLD: Tensor, mask: Any, inputs: Inputs
    ) -> MemoryImages: ...
    def read(self, readers: Readers, reader: Any, stock: Reading, inputs: Inputs) -> Any: ...
    def text_length(self, model: nn.Module, inputs: Inputs) -> int: ...


class Readers:
    """A reducer at work on what the readers of one model read; it holds what is true of every
    call."""

    def __init__(self, patch: Patch, spec: CrossSpec, model: nn.Module) -> None:
        self.patch, self.spec = patch, spec
        self.model: Any = model
        self.capture = VisionCapture(patch.traits)
        self.remaining = Memories()
        for module, name in spec.scopes(model):
            signature = inspect.signature(getattr(module, name))
            patch.wrap(module, name, _enter_scope, self, signature)
        for reader in spec.readers(model):
            patch.wrap(reader, "forward", _read, self, inspect.signature(reader.forward))
        if self.capture.needs:
            self.capture.watch(patch, spec, model)

    @contextmanager
    def scope(self, inputs: Inputs) -> Iterator[None]:
        """A call in which an encoder runs and is read; a call inside of another one goes on with
        what is known of its images."""
        with ExitStack() as stack:
            if self.capture.current is None:
                stack.enter_context(self.capture.call(inputs))
            token = _scope.set((self, self.inputs | inputs))
            stack.callback(_scope.reset, token)
            yield

    @property
    def inputs(self) -> Inputs:
        """Arguments of the scopes that are running, the inner ones first; none outside of one."""
        current = _scope.get()
        return current[1] if current is not None and current[0] is self else {}

    def reduce(self, memory_BLD: Tensor, mask: Any, inputs: Inputs) -> Remaining:
        """What is left of a memory, reduced if it was not before.

        Args:
            mask: of the reader.
            inputs: of the reader.
        """
        # Some models project their encoder's output anew in every step.
        encoded = self.inputs.get("encoder_outputs")
        key = memory_BLD if encoded is None else encoded[0]
        remaining = self.remaining.get(key)
        if remaining is None:
            images = self.spec.images(self, memory_BLD, mask, inputs)
            remaining = memories.reduce(self.patch, memory_BLD, images)
            self.remaining.put(key, remaining)
            self._record(remaining, memory_BLD, inputs, images)
        return remaining

    def _record(
        self, remaining: Remaining, memory_BLD: Tensor, inputs: Inputs, images: MemoryImages
    ) -> None:
        patch, depth = self.patch, self.patch.adapter.depth(self.model)
        text = self.spec.text_length(self.model, inputs)
        before, planned, ran = remaining.counts
        grids = {span.grid for span in images.spans}
        patch.entry = (text, before, grids.pop() if len(grids) == 1 else None)
        patch.planned, patch.lengths = ([(text, count)] * (depth + 1) for count in (planned, ran))
        patch.kept = memories.positions(remaining, memory_BLD)


def bind(signature: inspect.Signature, args: Any, kwargs: Inputs) -> Inputs:
    """The arguments of a method by name, those of its **kwargs among them."""
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    variable = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind == inspect.Parameter.VAR_KEYWORD
    ]
    for name in variable:
        arguments |= arguments.pop(name, {})
    return arguments


def _enter_scope(
    module: Any,
    stock: Callable[..., Any],
    readers: Readers,
    signature: inspect.Signature,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of a method in which an encoder runs and is read: the same, and its arguments
    recorded."""
    with readers.scope(bind(signature, args, kwargs)):
        return stock(*args, **kwargs)


def _read(
    reader: Any,
    stock: Callable[..., Any],
    readers: Readers,
    signature: inspect.Signature,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of a reader's `forward`: the same with what is left of its memory."""
    inputs = bind(signature, args, kwargs)
    return readers.spec.read(readers, reader, lambda arguments: stock(**arguments), inputs)


def read(readers: Readers, reader: Any, stock: Reading, inputs: Inputs) -> Any:
    """Read what is left of the memory among the arguments of a reader."""
    spec = readers.spec
    memory_BLD = inputs.get(spec.memory)
    if memory_BLD is None:
        return stock(inputs)
    mask = None if spec.mask is None else inputs.get(spec.mask)
    remaining = readers.reduce(memory_BLD, mask, inputs)
    if remaining.states_BKD is None:
        return stock(inputs)
    check_cache(inputs)
    inputs = inputs | {spec.memory: remaining.states_BKD}
    if spec.mask is not None:
        inputs[spec.mask] = cut_mask(readers, remaining, mask, reader, memory_BLD.dtype)
    return stock(inputs)


def check_cache(inputs: Inputs) -> None:
    """Raise ValueError for a cache of fixed length of what a decoder reads of its encoder."""
    kv_cache.check(getattr(kv_cache.find(inputs), "cross_attention_cache", None))


def cut_mask(
    readers: Readers, remaining: Remaining, mask: Any, reader: Any, dtype: torch.dtype
) -> Any:
    """A reader's mask for what is left of its memory."""
    backend = reader.config._attn_implementation if readers.spec.wide_mask else ""
    return remaining.cut_mask(mask, readers.spec.wide_mask, backend, dtype)
