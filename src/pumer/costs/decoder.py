"""Costs of a decoder: prefill, cache, and decoding of the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pumer.adapters.base import config_of
from pumer.adapters.decoder.costs import DecoderCosts, expert_weights, experts_per_token
from pumer.adapters.decoder.recurrent import state_macs
from pumer.adapters.macs import linear_weights
from pumer.costs.result import GIGA, Report

MEGA = 1e6
MATTERS = 0.1
"""Savings below this share of the total do not count as relevant."""
BALANCE = 150.0
"""Multiply-accumulates that a current accelerator computes in half precision while it reads one
weight."""


@dataclass(frozen=True)
class DecoderReport(Report):
    """The costs of a prompt, and of every token of the answer.

    `macs` and `parts` are up to the first token of the answer: vision tower, projection, prefill
    and the reducer.

    Args:
        cache_bytes: of keys and values after the prompt, per sample.
        base_cache_bytes: those of the unreduced model.
        decode_macs: multiply-accumulates of the next token, right after the prompt.
        base_decode_macs: those of the unreduced model.
        weights: parameters that every next token is multiplied with.
    """

    cache_bytes: int = 0
    base_cache_bytes: int = 0
    decode_macs: int = 0
    base_decode_macs: int = 0
    weights: int = 0

    def saved(self, tokens: int, balance: float = 0.0) -> float:
        """Share of the total cost that the reducer saves for an answer of this many tokens.

        Args:
            tokens: of the answer.
            balance: multiply-accumulates that the machine computes while it reads one weight.
                Decoding reads all weights per token, so on fast machines a token costs as much as
                this many tokens of a prompt. 0 counts arithmetic alone.
        """
        further, base_further = (
            max(macs, round(self.weights * balance)) * max(tokens - 1, 0)
            for macs in (self.decode_macs, self.base_decode_macs)
        )
        return 1 - (self.macs + further) / (self.base_macs + base_further)

    def matters_until(self, share: float = MATTERS, balance: float = 0.0) -> int | None:
        """The longest answer for which at least this share of the cost is saved.

        0 if not even for the first token; None if for any length.
        """
        if self.saved(1, balance) < share:
            return 0
        low, high = 1, 2
        while self.saved(high, balance) >= share:
            low, high = high, 2 * high
            if high > 10**9:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.saved(middle, balance) >= share else (low, middle)
        return low

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "cache_bytes": self.cache_bytes,
            "base_cache_bytes": self.base_cache_bytes,
            "decode_macs": self.decode_macs,
            "base_decode_macs": self.base_decode_macs,
            "matters_until": self.matters_until(),
            "matters_until_on_accelerators": self.matters_until(balance=BALANCE),
        }

    def __str__(self) -> str:
        cache, base_cache = (size / MEGA for size in (self.cache_bytes, self.base_cache_bytes))
        further, base_further = (
            2 * macs / GIGA for macs in (self.decode_macs, self.base_decode_macs)
        )
        lines = [
            super().__str__(),
            f"cache after the prompt {cache:.1f} MB instead of {base_cache:.1f}; "
            f"a further token {further:.2f} GFLOPs instead of {base_further:.2f}",
        ]
        if self.macs < self.base_macs:
            on_gpu = _until(self.matters_until(balance=BALANCE))
            lines += [
                f"the reducer saves {MATTERS:.0%} or more of prompt and answer together",
                f"  in FLOPs: {_until(self.matters_until())}",
                f"  in time on a GPU, whose decoding waits for the weights: {on_gpu}",
            ]
        return "\n".join(lines)


def _until(tokens: int | None) -> str:
    if tokens is None:
        return "for answers of any length"
    return f"for answers of up to {tokens} tokens" if tokens else "for no answer, however short"


def decoding(model: nn.Module, adapter: DecoderCosts, report: Report) -> DecoderReport:
    """Extend a report by the costs of decoding."""
    head = adapter.head_macs(model)
    top_k = experts_per_token(config_of(model).get_text_config())
    layers = list(zip(adapter.layers(model), adapter.passes(model), strict=True))
    linear = sum(
        times * (linear_weights(layer) + expert_weights(layer, top_k)) for layer, times in layers
    )
    states = sum(times * state_macs(layer) for layer, times in layers)
    reduced, stock = report.lengths, (report.entry,) * len(report.lengths)
    return DecoderReport(
        **vars(report),
        cache_bytes=_cache(model, adapter, reduced),
        base_cache_bytes=_cache(model, adapter, stock),
        decode_macs=_further(adapter, model, reduced) + states + linear + head,
        base_decode_macs=_further(adapter, model, stock) + states + linear + head,
        weights=linear + head,
    )


def _cached(
    model: nn.Module, adapter: DecoderCosts, lengths: tuple[tuple[int, int], ...]
) -> list[int]:
    """Tokens in every layer's cache after the prompt."""
    cached = adapter.cached_tokens(model, lengths)
    if cached is not None:
        return cached
    config = config_of(model).get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * adapter.depth(model)
    counts = [sum(pair) for pair in lengths[:-1]]
    window = getattr(config, "sliding_window", None) or math.inf
    return [
        int(min(count, window - 1)) if layer_type == "sliding_attention" else count
        for count, layer_type in zip(counts, kinds, strict=True)
    ]


def _cache(model: nn.Module, adapter: DecoderCosts, lengths: tuple[tuple[int, int], ...]) -> int:
    weight: torch.Tensor = next(adapter.language(model).layers.parameters())
    width = weight.element_size() if weight.is_floating_point() else 2
    held = zip(adapter.cache_channels(model), _cached(model, adapter, lengths), strict=True)
    return width * sum(channels * count for channels, count in held)


def _further(adapter: DecoderCosts, model: nn.Module, lengths: tuple[tuple[int, int], ...]) -> int:
    """Multiply-accumulates of the next token's attention."""
    heads, channels = adapter.attention_shape(model)
    counts = zip(
        adapter.layers(model), adapter.passes(model), _cached(model, adapter, lengths), strict=True
    )
    attended = sum(
        times * (count + 1)
        for layer, times, count in counts
        if adapter.layer_attention(layer) is not None
    )
    return 2 * heads * channels * attended
