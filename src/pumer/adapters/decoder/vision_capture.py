"""What a vision tower knows of its patches, seen while it runs: attention, keys, features.

Shape suffixes: R crops, P patches, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.spec import DecoderSpec
from pumer.adapters.forward import no_autocast
from pumer.reducers import EMBEDDINGS, Tokens
from pumer.reducers.tokens import Encoder

CLASS_ATTENTION = "class_attention_BN"
LAST_CLASS_ATTENTION, LAST_KEYS = "last_class_attention_BN", "last_keys_BNC"
OF_LAST_LAYER = frozenset({LAST_CLASS_ATTENTION, LAST_KEYS})
RECEIVED, GIVEN = "received_BN", "given_BN"
AT_ONCE = 256
"""Queries whose attention to all patches is there at one time."""


_current: ContextVar[Captured | None] = ContextVar("pumer_captured", default=None)


class VisionCapture:
    """What is asked of a vision tower: queries and keys of one layer, and what goes into the
    projector."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs

    def install(self, patch: Patch, spec: DecoderSpec, model: nn.Module) -> None:
        """Begin to look, if a reducer needs anything."""
        if not self.needs:
            return
        projector = spec.projector(model)
        patch.hook(projector.register_forward_pre_hook(self._on_projector))
        if patch.reducer.traits.before_projector and spec.projects_tokens:
            merging = partial(self._merge, patch, spec, spec.trunk(model))
            patch.hook(projector.register_forward_pre_hook(merging))
            patch.hook(projector.register_forward_hook(self._expand))
        if self.needs - {"features_BND"}:
            attention = spec.tower_attention(model)
            watched = {"heads": attention}
            if self.needs & OF_LAST_LAYER and spec.last_attention(model) not in (None, attention):
                watched["last_heads"] = spec.last_attention(model)
            for name, module in watched.items():
                decoder_attention.watch(
                    patch, module, partial(self._on_qk, name, module), "vision_config"
                )

    @property
    def current(self) -> Captured | None:
        """What this call has seen so far; None where the tower runs outside of
        `get_image_features`."""
        captured = _current.get()
        return captured if captured is not None and captured.capture is self else None

    @contextmanager
    def call(self, inputs: dict[str, Any]) -> Iterator[Captured]:
        """One call of `get_image_features`: what hooks see inside the with block is its own."""
        captured = Captured(self, self.needs, inputs=inputs)
        token = _current.set(captured)
        try:
            yield captured
        finally:
            _current.reset(token)

    def _on_projector(self, _: nn.Module, args: Any) -> None:
        if self.current is not None:
            self.current.features_RPD = args[0].detach()

    def _merge(self, patch: Patch, spec: DecoderSpec, trunk: Any, _: nn.Module, args: Any) -> Any:
        """Before the projector: one token for every group, in place of all the patches."""
        captured = self.current
        if captured is None:
            return None
        features_RPD = args[0]
        encoder = Encoder(**spec.image_facts(trunk, captured))
        image = next(len(value[0]) for value in vars(encoder).values() if value is not None)
        real_RP = torch.ones(features_RPD.shape[:2], device=features_RPD.device, dtype=torch.bool)
        tokens = Tokens(
            mask_BN=real_RP,
            text=0,
            sizes_BN=real_RP.float(),
            layer=EMBEDDINGS,
            num_prefix_tokens=features_RPD.shape[1] - image,  # [CLS], in models that hand it on
            encoder=encoder,
        )
        with torch.no_grad(), no_autocast(patch.reducer, features_RPD.device):
            captured.plan = patch.reducer.plan(tokens)
        captured.merged = captured.plan.tail(tokens.num_prefix_tokens).averaging()
        return (captured.plan.reduce(features_RPD), *args[1:])

    def _expand(self, _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After it: as many tokens as ever, all of a group the same, of which the language model
        gets one."""
        captured = self.current
        return None if captured is None or captured.plan is None else captured.plan.expand(output)

    def _on_qk(self, name: str, attention: Any, queries: Tensor, keys: Tensor, _: Any) -> None:
        if self.current is not None:  # layers may be computed again for their gradients
            getattr(self.current, name).append(normalize_qk_scale(attention, queries, keys))


def vision_features(
    captured: Captured, tower: bool = False, projected: bool = False
) -> dict[str, Tensor]:
    """What a vision tower knows of the patches of every crop [R,P,...], from the layer that its
    features come from.

    Args:
        captured: what was seen of the tower.
        tower: whether its tokens begin with one that is no patch of the picture's.
        projected: whether what goes into the projector does.
    """
    features, needs = captured.features_RPD, captured.needs
    facts = {} if features is None else {"features_BND": features[:, int(projected) :]}
    if captured.heads:
        facts |= attention_of(needs, *captured.heads[-1], tower)
    if captured.last_heads:
        facts |= all_heads_as_one(needs, *captured.last_heads[-1], tower)
    return {name: facts[name] for name in needs}


def attention_of(
    needs: frozenset[str], queries_RHPC: Tensor, keys_RHPC: Tensor, first: bool
) -> dict[str, Tensor]:
    """What `Encoder` says of attention, from queries and keys whose products over sqrt(C) are the
    logits.

    `first` is whether the first token, such as [CLS], is no patch.
    """
    facts = all_heads_as_one(needs, queries_RHPC, keys_RHPC, first)
    facts |= {
        "keys_BNC": keys_RHPC.mean(1)[:, int(first) :],
        "queries_BNC": queries_RHPC.mean(1)[:, int(first) :],
    }
    # Scaled before they are multiplied: in half precision the products alone may be too large.
    queries_RHPC = queries_RHPC * queries_RHPC.shape[-1] ** -0.5
    if CLASS_ATTENTION in needs:
        logits = queries_RHPC[:, :, :1].float() @ keys_RHPC.float().transpose(2, 3)
        facts[CLASS_ATTENTION] = logits.softmax(-1)[:, :, 0, 1:].mean(1)
    if {RECEIVED, GIVEN} & needs:
        # Never all at once, which for the thousands of patches of a large picture would be
        # gigabytes.
        received, paid = [], []
        for part in queries_RHPC.split(AT_ONCE, 2):
            attention = (part @ keys_RHPC.transpose(2, 3)).float().softmax(-1)
            received.append(attention.sum((1, 2)))
            paid.append(attention[..., int(first) :].mean((1, 3)))
        facts[RECEIVED] = (torch.stack(received).sum(0) / queries_RHPC.shape[1:3].numel())[
            :, int(first) :
        ]
        facts[GIVEN] = torch.cat(paid, 1)[:, int(first) :]
    return facts


def all_heads_as_one(
    needs: frozenset[str], queries_RHPC: Tensor, keys_RHPC: Tensor, first: bool
) -> dict[str, Tensor]:
    """What `Encoder` says of the tower's last layer; arguments as for `attention_of`."""
    if not OF_LAST_LAYER & needs:
        return {}
    keys_RPC = keys_RHPC.transpose(1, 2).flatten(2)
    facts = {LAST_KEYS: keys_RPC[:, int(first) :]}
    if LAST_CLASS_ATTENTION in needs:
        query_R1C = queries_RHPC[:, :, :1].transpose(1, 2).flatten(2) * keys_RPC.shape[2] ** -0.5
        logits = (query_R1C.float() @ keys_RPC.float().transpose(1, 2))[:, 0]
        facts[LAST_CLASS_ATTENTION] = logits.softmax(-1)[:, 1:]
    return facts


def normalize_qk_scale(attention: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products over sqrt(C) are the layer's logits, whatever it scales by,
    detached."""
    scaling = attention.scaling if hasattr(attention, "scaling") else attention.scale
    factor = scaling * queries.shape[-1] ** 0.5
    queries = queries.detach()
    return queries if abs(factor - 1) < 1e-6 else queries * factor, keys.detach()
