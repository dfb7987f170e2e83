"""What a vision tower computes about its patches, captured while it runs.

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
from torch.utils.weak import WeakIdKeyDictionary

from pumer.adapters.base import Patch
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.spec import DecoderSpec, TowerSpec
from pumer.adapters.forward import no_autocast
from pumer.reducers import EMBEDDINGS, Tokens
from pumer.reducers.base import Traits
from pumer.reducers.tokens import Encoder

CLASS_ATTENTION = "class_attention_BN"
LAST_CLASS_ATTENTION, LAST_KEYS = "last_class_attention_BN", "last_keys_BNC"
OF_LAST_LAYER = frozenset({LAST_CLASS_ATTENTION, LAST_KEYS})
RECEIVED, GIVEN = "received_BN", "given_BN"
MIDDLE_RECEIVED = "middle_received_BN"
AT_ONCE = 256
"""Queries whose attention to all patches is there at one time."""


_current: ContextVar[Captured | None] = ContextVar("pumer_captured", default=None)
_of_video: ContextVar[bool] = ContextVar("pumer_of_video", default=False)


class VisionCapture:
    """Captures queries and keys of layers of a vision tower, and the input of the projector."""

    def __init__(self, traits: Traits) -> None:
        self.needs, self.middle_layer = traits.needs_encoder, traits.middle_layer

    def install(self, patch: Patch, spec: DecoderSpec, model: nn.Module) -> None:
        """Hook in, if a reducer needs anything."""
        if not self.needs:
            return
        projector = spec.projector(model)
        patch.hook(projector.register_forward_pre_hook(self._on_projector, with_kwargs=True))
        if patch.reducer.traits.before_projector and spec.projects_tokens:
            merging = partial(self._merge, patch, spec, spec.trunk(model))
            patch.hook(projector.register_forward_pre_hook(merging))
            patch.hook(projector.register_forward_hook(self._expand))
        self.watch(patch, spec, model)

    def watch(self, patch: Patch, spec: TowerSpec, model: nn.Module) -> None:
        """Capture queries and keys of the layers of the tower that a reducer reads."""
        if self.needs - {"features_BND"}:
            attention = spec.tower_attention(model)
            watched = {"heads": attention}
            if self.needs & OF_LAST_LAYER and spec.last_attention(model) not in (None, attention):
                watched["last_heads"] = spec.last_attention(model)
            if MIDDLE_RECEIVED in self.needs and self.middle_layer is not None:
                middle = spec.tower_attentions(model)[self.middle_layer]
                if middle is not attention:
                    watched["middle_heads"] = middle
            for name, module in watched.items():
                decoder_attention.capture_qk(
                    patch, module, partial(self._on_qk, name), "vision_config"
                )

    @property
    def current(self) -> Captured | None:
        """What this call has captured so far; None where the tower runs outside of
        `get_image_features`."""
        captured = _current.get()
        return captured if captured is not None and captured.capture is self else None

    def is_image(self) -> bool:
        """Whether the tower runs on images of `get_image_features`, and not on a video's frames."""
        return self.current is not None and not _of_video.get()

    @contextmanager
    def of_video(self) -> Iterator[None]:
        """One call of `get_video_features`, which may ask `get_image_features` for its frames."""
        token = _of_video.set(True)
        try:
            yield
        finally:
            _of_video.reset(token)

    @contextmanager
    def call(self, inputs: dict[str, Any]) -> Iterator[Captured]:
        """One call of `get_image_features`: what hooks see inside the with block is its own."""
        captured = Captured(self, self.needs, inputs=inputs)
        token = _current.set(captured)
        try:
            yield captured
        finally:
            _current.reset(token)

    def _on_projector(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.current is not None:
            self.current.features.append(next(iter((*args, *kwargs.values()))).detach())

    def _merge(self, patch: Patch, spec: DecoderSpec, trunk: Any, _: nn.Module, args: Any) -> Any:
        """Before the projector: one token for every group, in place of all the patches."""
        captured = self.current
        if captured is None:
            return None
        features_RPD = args[0]
        encoder = Encoder(**spec.vision_facts(trunk, captured))
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
        merged = captured.plan.tail(tokens.num_prefix_tokens).averaging()
        captured.merged = [merged.rows([row]) for row in range(len(features_RPD))]
        return (captured.plan.reduce(features_RPD), *args[1:])

    def _expand(self, _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After it: as many tokens as ever, all of a group the same, of which the language model
        gets one."""
        captured = self.current
        return None if captured is None or captured.plan is None else captured.plan.expand(output)

    def _on_qk(self, name: str, queries: Tensor, keys: Tensor, _: Any) -> None:
        if self.current is not None:  # layers may be computed again for their gradients
            getattr(self.current, name).append((queries, keys))


def vision_features(
    captured: Captured, tower: bool = False, projected: int = 0
) -> dict[str, Tensor]:
    """Facts about the patches of every crop [R,P,...], from the layer that the features come from.

    Args:
        captured: of the tower.
        tower: whether its tokens begin with one that is no patch of the image.
        projected: how many such tokens what goes into the projector begins with.
    """
    features, needs = captured.features_RPD, captured.needs
    facts = {} if features is None else {"features_BND": features[:, projected:]}
    if captured.heads:
        facts |= attention_of(needs, *captured.heads[-1], tower)
        facts |= received_in_middle(needs, *(captured.middle_heads or captured.heads)[-1], tower)
    if captured.last_heads:
        facts |= all_heads_as_one(needs, *captured.last_heads[-1], tower)
    return {name: facts[name] for name in needs}


def attention_of(
    needs: frozenset[str], queries_RHPC: Tensor, keys_RHPC: Tensor, first: int
) -> dict[str, Tensor]:
    """What `Encoder` says of attention, from queries and keys whose products over sqrt(C) are the
    logits.

    `first` is how many of the first tokens, such as [CLS], are no patches.
    """
    facts = all_heads_as_one(needs, queries_RHPC, keys_RHPC, first)
    facts |= {
        "keys_BNC": keys_RHPC.mean(1)[:, first:],
        "queries_BNC": queries_RHPC.mean(1)[:, first:],
    }
    # Scaled before they are multiplied: in half precision the products alone may be too large.
    queries_RHPC = queries_RHPC * queries_RHPC.shape[-1] ** -0.5
    if CLASS_ATTENTION in needs:
        logits = queries_RHPC[:, :, :1].float() @ keys_RHPC.float().transpose(2, 3)
        facts[CLASS_ATTENTION] = logits.softmax(-1)[:, :, 0, 1:].mean(1)
    if {RECEIVED, GIVEN} & needs:
        # In parts: all at once would take gigabytes for the thousands of patches of a large image.
        received, paid = [], []
        for part in queries_RHPC.split(AT_ONCE, 2):
            attention = (part @ keys_RHPC.transpose(2, 3)).float().softmax(-1)
            received.append(attention.sum((1, 2)))
            paid.append(attention[..., first:].mean((1, 3)))
        facts[RECEIVED] = (torch.stack(received).sum(0) / queries_RHPC.shape[1:3].numel())[
            :, first:
        ]
        facts[GIVEN] = torch.cat(paid, 1)[:, first:]
    return facts


def received_in_middle(
    needs: frozenset[str], queries_RHPC: Tensor, keys_RHPC: Tensor, first: int
) -> dict[str, Tensor]:
    """What `Encoder` says of the layer that a reducer names; arguments as for `attention_of`."""
    if MIDDLE_RECEIVED not in needs:
        return {}
    facts = attention_of(frozenset({RECEIVED}), queries_RHPC, keys_RHPC, first)
    return {MIDDLE_RECEIVED: facts[RECEIVED]}


def all_heads_as_one(
    needs: frozenset[str], queries_RHPC: Tensor, keys_RHPC: Tensor, first: int
) -> dict[str, Tensor]:
    """What `Encoder` says of the tower's last layer; arguments as for `attention_of`."""
    if not OF_LAST_LAYER & needs:
        return {}
    keys_RPC = keys_RHPC.transpose(1, 2).flatten(2)
    facts = {LAST_KEYS: keys_RPC[:, first:]}
    if LAST_CLASS_ATTENTION in needs:
        query_R1C = queries_RHPC[:, :, :1].transpose(1, 2).flatten(2) * keys_RPC.shape[2] ** -0.5
        logits = (query_R1C.float() @ keys_RPC.float().transpose(1, 2))[:, 0]
        facts[LAST_CLASS_ATTENTION] = logits.softmax(-1)[:, 1:]
    return facts


class EncodedImages:
    """Images that were encoded before the call that they are for.

    `generate` asks for the image features first and hands the vision tower's output to the forward.
    What the tower said of these images is kept beside the output for as long as somebody holds it,
    never on it: hooks that move tensors between devices rebuild every output.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which hold no features."""
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]

    def remember(self, output: Any, images: list[ImageSpan]) -> None:
        """Note the images of an output of `get_image_features`."""
        for features in _tensors(output):
            self._known[features] = images

    def recall(self, output: Any) -> list[ImageSpan]:
        """The images of an output, or of one that was rebuilt from its tensors or copies of them.

        Raises:
            ValueError: if nothing is known of them.
        """
        outputs = list(_tensors(output))
        for features in outputs:
            if features in self._known:
                images: list[ImageSpan] = self._known[features]
                return images
        # They were copied, as between devices: seldom, and the host has to look at them.
        for features, images in list(self._known.items()):
            if any(_same(features, other) for other in outputs):
                return list(images)
        raise ValueError(
            "nothing is known of the images in mm_encoder_outputs: give what get_image_features "
            "returns while this reducer is active, all in one prefill (leave prefill_chunk_size "
            "unset)"
        )


def _same(features: Tensor, other: Tensor) -> bool:
    if features.shape != other.shape:
        return False
    return torch.equal(features, other.to(features.device, features.dtype))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The features, and what the tower gives besides."""
    if isinstance(output, tuple):  # not what `mm_encoder_outputs` takes
        return
    values = [output.get("pooler_output"), *output.values()]
    while values:
        value = values.pop(0)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            values += value
