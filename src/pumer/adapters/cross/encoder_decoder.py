"""Models with an encoder that has words and image tokens on one axis, and a decoder that reads it.

The encoder is reduced as a language model is, before its first layer and inside it. Its output
comes in the prompt's length; what was dropped is taken out again, and out of the mask, when the
decoder reads it.

Shape suffixes: B samples, S tokens of the prompt, K those that are left, D channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.cross.costs import CROSS
from pumer.adapters.cross.memory import Memories, Remaining
from pumer.adapters.cross.reader import bind, check_cache
from pumer.adapters.decoder.costs import linear_weights
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.hooks import DecoderHooks
from pumer.reducers.plan import tokens_at

MEMORY, MASK = "encoder_hidden_states", "encoder_attention_mask"
_generating: ContextVar[list[Remaining] | None] = ContextVar("pumer_generating", default=None)
"""What the encoder has left in the call of `generate` that is running."""


class EncoderDecoderAdapter(DecoderAdapter):
    """The trunk is what merges words and images, the language model is the encoder."""

    causal = False
    answers_in_prompt = False
    placeholder_hook = None
    decodes = False

    def writer(self, model: nn.Module) -> Any:
        """The decoder that reads the encoder's output."""
        raise NotImplementedError

    def start(self, patch: Patch, model: nn.Module) -> DecoderHooks:
        hooks, encoded = super().start(patch, model), Encoded()
        writer = self.writer(model)
        patch.wrap(hooks.language, "forward", _encode, hooks, encoded)
        patch.wrap(writer, "forward", _write, encoded, inspect.signature(writer.forward))
        if hasattr(model, "generate"):
            patch.wrap(model, "generate", _generate)
        return hooks

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Also of the decoder up to its first token: keys and values of what is left, and one
        query."""
        parts = super().macs(model, lengths, entry, tower, after_layer)
        writer, length = self.writer(model), sum(lengths[-1])
        per_token = linear_weights(writer)
        of_memory = sum(
            linear_weights(part)
            for name, part in writer.named_modules()
            if name.rpartition(".")[2] in ("k_proj", "v_proj") and _reads_memory(name)
        )
        return parts | {"language model": per_token + (length - 1) * of_memory}


def _reads_memory(name: str) -> bool:
    """Whether a projection is that of a cross-attention, or of one for both."""
    parts = name.split(".")
    return parts[-2] in CROSS or ("encoder_attn" not in parts and "self_attn" in parts)


class Encoded:
    """What is left of the encoder's outputs."""

    def __init__(self) -> None:
        self.memories = Memories()

    def put(self, output_BSD: Tensor, remaining: Remaining) -> None:
        """Note what is left of an output."""
        self.memories.put(output_BSD, remaining)
        generating = _generating.get()
        if generating is not None:
            generating.append(remaining)

    def get(self, output_BSD: Tensor) -> Remaining | None:
        """What is left of it; None for all. Beams are several copies of one output."""
        remaining, generating = self.memories.get(output_BSD), _generating.get()
        if remaining is not None or not generating:
            return remaining
        (*_, last) = generating
        assert last.index_BK is not None
        assert last.states_BKD is not None
        copies, remainder = divmod(len(output_BSD), len(last.index_BK))
        if remainder:
            return None
        filled = last.filled_BK
        repeated = replace(
            last,
            states_BKD=last.states_BKD.repeat_interleave(copies, 0),
            index_BK=last.index_BK.repeat_interleave(copies, 0),
            filled_BK=None if filled is None else filled.repeat_interleave(copies, 0),
        )
        self.memories.put(output_BSD, repeated)
        return repeated


def _encode(
    encoder: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    encoded: Encoded,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of the encoder's `forward`: the same, and what is left of its output noted."""
    with hooks.enter(lambda state: state.language_entered) as state:
        output = stock(*args, **kwargs)
    if state.layouts and not state.layouts[-1].unreduced and not isinstance(output, tuple):
        layout, states_BSD = state.layouts[-1], output.last_hidden_state
        index_BK = layout.index_BK.to(states_BSD.device)
        states_BKD = tokens_at(states_BSD, index_BK)
        encoded.put(states_BSD, Remaining(states_BKD, index_BK, layout.filled_BK))
    return output


def _write(
    writer: Any,
    stock: Callable[..., Any],
    encoded: Encoded,
    signature: inspect.Signature,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of the decoder's `forward`: the same with what is left of the encoder's output."""
    inputs = bind(signature, args, kwargs)
    output_BSD = inputs.get(MEMORY)
    remaining = None if output_BSD is None else encoded.get(output_BSD)
    if remaining is None:
        return stock(*args, **kwargs)
    assert remaining.states_BKD is not None
    check_cache(inputs)
    mask = remaining.cut_mask(inputs.get(MASK), False, "", remaining.states_BKD.dtype)
    return stock(**inputs | {MEMORY: remaining.states_BKD, MASK: mask})


def _generate(model: Any, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of `generate`: what its encoder leaves is known while it runs."""
    token = _generating.set([])
    try:
        return stock(*args, **kwargs)
    finally:
        _generating.reset(token)
