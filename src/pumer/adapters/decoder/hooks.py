"""The way of a call through a reduced decoder: what is wrapped and hooked, and what each hands on.

Everything goes through methods and hooks of the instance. A reduction "after layer k" happens
before layer k + 1 runs, with the queries and keys of layer k; `EMBEDDINGS` is before layer 0. The
model itself goes on counting unreduced tokens: masks and rotary embeddings are made by it in full
and cut here, layer by layer, and so the cache's (`kv_cache`). Where the patch says so, positions
are then counted anew (`positions`).

What a call needs to know is in its `ForwardState`. The model, its trunk (the model without its
head) and its language model each begin one when they are called by themselves, and go on with that
of the one that calls them.

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer, L keys of the layer, N
tokens of a view, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, exact, timed
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder import kv_cache, positions, prefill
from pumer.adapters.decoder import output as decoder_output
from pumer.adapters.decoder import reduce as reduce_llm
from pumer.adapters.decoder.encoded import EncodedImages
from pumer.adapters.decoder.prompt import (
    Attended,
    Axis,
    ForwardState,
    current_state,
    enter_state,
    gather,
)
from pumer.adapters.decoder.spec import DecoderSpec
from pumer.adapters.decoder.vision_capture import VisionCapture, normalize_qk_scale

QUESTION_MASK = "question_mask"
STATE = "pumer_state"
"""Keyword argument by which a call's state reaches the layers, and with them their
recomputation."""


class DecoderHooks:
    """A reducer at work in one model. It holds what is true of every call, and nothing of any."""

    def __init__(self, patch: Patch, spec: DecoderSpec, model: nn.Module) -> None:
        self.patch, self.spec = patch, spec
        self.trunk: Any = spec.trunk(model)
        self.language: Any = spec.language(model)
        self.capture = VisionCapture(patch.reducer.needs)
        self.encoded = EncodedImages()
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        patch, spec, reducer = self.patch, self.spec, self.patch.reducer
        trunk, language = self.trunk, self.language
        if model is not trunk:
            parameters = inspect.signature(model.forward)
            patch.wrap(model, "forward", _model_forward, self, parameters, adds=(QUESTION_MASK,))
        parameters = inspect.signature(trunk.forward)
        patch.wrap(trunk, "forward", _trunk_forward, self, parameters, adds=(QUESTION_MASK,))
        patch.wrap(language, "forward", _language_forward, self)
        for layer_index, layer in enumerate(language.layers):
            before_layer = partial(self._before_layer, layer_index)
            patch.hook(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            if reducer.reduces_at(layer_index):
                on_qk = partial(self._on_qk, layer_index)
                # Where all tokens see each other words of the answer are summed up, too, which must
                # not guide.
                decoder_attention.watch(patch, layer.self_attn, on_qk, normalizer=spec.causal)
        self.capture.install(patch, spec, model)
        patch.wrap(trunk, "get_image_features", _image_features, self)
        if hasattr(trunk, "get_video_features"):
            patch.wrap(trunk, "get_video_features", _video_features, self)
        in_place = spec.merger == "get_placeholder_mask"
        patch.wrap(trunk, spec.merger, _placeholder_mask if in_place else _inputs_merger, self)
        spec.install(patch, model, self.capture)
        if hasattr(language, "_deepstack_process"):
            patch.wrap(language, "_deepstack_process", _deepstack, self)

    def enter(self, begun: Callable[[ForwardState], bool]) -> AbstractContextManager[ForwardState]:
        """The state of the call that goes on, or one that begins where there is none, or it is
        `begun`."""
        state = current_state(self)
        if state is None or begun(state):
            return enter_state(ForwardState(self))
        return nullcontext(state)

    def begin(self, state: ForwardState, inputs: dict[str, Any]) -> None:
        """Take in what the trunk is called with.

        Raises:
            ValueError: for inputs that cannot be reduced, before anything is computed.
        """
        state.entered, state.inputs = True, inputs
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            state.images = self.encoded.recall(encoded)
        if encoded is not None or inputs.get("pixel_values") is not None:
            decoder_attention.check_backend(self.language.config)
            prefill.check_inputs(inputs)
        elif prefill.may_be_merged(inputs):
            warnings.warn(
                "nothing was reduced in a call that brings inputs_embeds alone: if images are "
                "merged into "
                "them already, give this model pixel_values instead",
                stacklevel=4,
            )

    def _on_qk(
        self, layer_index: int, queries_BHKC: Tensor, keys_BhLC: Tensor, options: dict[str, Any]
    ) -> None:
        state = current_state(self)
        if state is None or state.axis is None or len(state.axes) != layer_index + 1:
            return  # nothing to reduce, or the layer is being computed again for its gradients
        attention = self.language.layers[layer_index].self_attn
        queries, keys = normalize_qk_scale(attention, queries_BHKC, keys_BhLC)
        held = kv_cache.held(kv_cache.find(state.inputs), layer_index)
        state.seen[layer_index] = Attended(
            queries,
            keys,
            options.get("sliding_window"),
            options.get("softcap"),
            held,
            options.get(decoder_attention.NORMALIZER),
        )

    @timed("decoder")
    def _before_layer(
        self, layer_index: int, _: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: reduce after the one before it, and cut what goes along with the
        tokens."""
        kwargs = dict(kwargs)
        state: ForwardState | None = kwargs.pop(STATE, None) or current_state(self)
        if state is None:
            return args, kwargs
        cache, states = kv_cache.find(kwargs), args[0] if args else kwargs["hidden_states"]
        if layer_index == 0:
            state.past, state.length = kv_cache.length(cache), states.shape[1]
        if state.axis is not None:
            states = self._reduced(state, layer_index, states)
        axis = None
        if state.axes:
            axis = None if state.axes[layer_index].whole else state.axes[layer_index]
        held = kv_cache.held(cache, layer_index)
        if axis is None and held is None:
            return args, kwargs
        mask = kwargs.get("attention_mask")
        cut = partial(self._cut_mask, state, layer_index, mask, axis, cache, held, states)
        kwargs["attention_mask"] = state.once((mask, axis, held), cut)
        if axis is not None:
            for name in ("position_embeddings", "position_ids"):
                full = kwargs.get(name)
                cut = partial(gather, full, axis.index_BK, state.length)
                kwargs[name] = state.once((full, axis), cut)
        if self.patch.renumber:
            positions.renumber(self.language, state, layer_index, axis, held, kwargs)
        if axis is not None and self.language.config._attn_implementation.startswith("flash"):
            kwargs["position_ids"] = None  # whose gaps it would take for ends of packed sequences
        if not args:
            return (), kwargs | {"hidden_states": states}
        return (states, *args[1:]), kwargs

    def _reduced(self, state: ForwardState, layer_index: int, states_BKD: Tensor) -> Tensor:
        """The states that a layer runs on."""
        if layer_index < len(state.axes):  # it is computed again: what was decided then holds
            plan = state.plans[layer_index]
            return states_BKD if plan is None else plan.to(states_BKD.device).reduce(states_BKD)
        if layer_index == 0 and self.patch.reducer.reads_embeddings:
            state.embeddings_BSD = states_BKD.detach()
        states_BKD, plan = reduce_llm.reduce(
            self.patch, state, layer_index - 1, states_BKD, self.spec.causal
        )
        assert state.axis is not None
        state.axes.append(state.axis)
        state.plans.append(plan)
        state.widths.append(states_BKD.shape[1])
        return states_BKD

    def _cut_mask(
        self,
        state: ForwardState,
        layer_index: int,
        mask: Any,
        axis: Axis | None,
        cache: Any,
        held: kv_cache.Held | None,
        states: Tensor,
    ) -> Any:
        """The attention mask of a layer, for the tokens it has and those that its cache holds."""
        columns_BK, filled_BK = state.places_of(axis, len(states), states.device)
        offset = 0
        if state.past:
            layer = cache.layers[layer_index]
            _, offset = layer.get_mask_sizes(state.length)
            cached = layer.keys.shape[-2]
            columns_BK, filled_BK = kv_cache.before(held, state.past, cached, columns_BK, filled_BK)
        return decoder_attention.cut_mask(
            mask,
            None if axis is None else axis.index_BK,
            columns_BK,
            filled_BK,
            offset,
            state.past,
            state.length,
            self.language.config._attn_implementation,
            states.dtype,
        )


def _bind(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a method is called with, by name."""
    arguments = signature.bind_partial(*args, **kwargs).arguments
    return arguments | arguments.get("kwargs", {})


def _model_forward(
    model: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    signature: inspect.Signature,
    *args: Any,
    question_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the whole model's `forward`: the same, and noted what it was called with.

    A hook would miss those who call `forward` themselves, as PEFT does.
    """
    with enter_state(ForwardState(hooks)) as state:
        state.call_kwargs = _bind(signature, args, kwargs) | {QUESTION_MASK: question_mask}
        return stock(*args, **kwargs)


def _trunk_forward(
    trunk: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    signature: inspect.Signature,
    *args: Any,
    question_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the trunk's `forward`."""
    with hooks.enter(lambda state: state.entered) as state:
        if question_mask is not None:
            state.call_kwargs[QUESTION_MASK] = question_mask
        hooks.begin(state, _bind(signature, args, kwargs))
        return stock(*args, **kwargs)


def _language_forward(
    language: Any, stock: Callable[..., Any], hooks: DecoderHooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of the language model's `forward`: states come back in the prompt's length."""
    with hooks.enter(lambda state: state.left) as state:
        state.left = True
        if not state.inputs:  # it is called by itself, maybe to go on with a reduced prompt
            state.inputs = dict(kwargs)
        output = stock(*args, **kwargs, **{STATE: state})
        if not isinstance(output, tuple):
            decoder_output.finish(hooks.patch, state, output, kv_cache.find(output))
        return output


def _image_features(
    trunk: Any, stock: Callable[..., Any], hooks: DecoderHooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_image_features`: the same, and the images noted."""
    spec = hooks.spec
    names = list(inspect.signature(type(trunk).get_image_features).parameters)[1:]

    def near(name: str, value: Any) -> Any:
        return value.cpu() if name in spec.on_host and isinstance(value, Tensor) else value

    args = tuple(near(name, value) for name, value in zip(names, args, strict=False))
    kwargs = {name: near(name, value) for name, value in kwargs.items()}
    inputs = dict(zip(names, args, strict=False)) | kwargs
    with hooks.capture.call(inputs) as captured:
        output = stock(*args, **kwargs)
        # A replica has no parameters that would say where it is.
        device = next(
            value.device
            for value in inputs.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        exact_choice = exact(hooks.patch.reducer, device)
        with hooks.patch.timing("decoder"), torch.no_grad(), exact_choice:
            images = spec.pictures(trunk, output, captured)
        if captured.merged is not None:
            merged = captured.merged
            images = [replace(image, merged=merged.rows([row])) for row, image in enumerate(images)]
    state = current_state(hooks)
    if state is not None and state.entered:
        state.images = images
    hooks.encoded.remember(output, images)  # for those who give it as `mm_encoder_outputs`
    return output


def _video_features(
    trunk: Any, stock: Callable[..., Any], hooks: DecoderHooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_video_features`, which may ask `get_image_features`: the call's images are
    kept."""
    state = current_state(hooks)
    images = None if state is None else state.images
    output = stock(*args, **kwargs)
    if state is not None and images is not None:
        state.images = images
    return output


def _placeholder_mask(
    trunk: Any, stock: Callable[..., Any], hooks: DecoderHooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_placeholder_mask`: the same marks, but of what it makes the host read more
    use is made."""
    state = current_state(hooks)
    arguments = (
        inspect.signature(type(trunk).get_placeholder_mask).bind(trunk, *args, **kwargs).arguments
    )
    features = arguments.get("image_features")
    if state is None or not state.entered or features is None:
        return stock(*args, **kwargs)
    image, others = hooks.spec.marks(trunk, arguments.get("input_ids"), arguments["inputs_embeds"])
    with hooks.patch.timing("decoder"):
        prefill.begin(hooks.spec, trunk, state, image, features.numel() // features.shape[-1])
    return image[..., None] if others is None else (image[..., None], others[..., None])


def _inputs_merger(
    trunk: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    image_hidden_states: Tensor,
) -> Tensor:
    """In place of `inputs_merger`, which puts the features there, too."""
    state = current_state(hooks)
    if state is None or not state.entered:
        merged: Tensor = stock(input_ids, inputs_embeds, image_hidden_states)
        return merged
    image, _ = hooks.spec.marks(trunk, input_ids, inputs_embeds)
    features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
    with hooks.patch.timing("decoder"):
        prefill.begin(hooks.spec, trunk, state, image, features.numel() // features.shape[-1])
    return inputs_embeds.masked_scatter(image[..., None], features)


def _deepstack(
    language: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    states: Tensor,
    visual_pos_masks: Tensor,
    planes: Tensor,
) -> Tensor:
    """In place of `_deepstack_process`, which adds a plane of visual features to the states of a
    layer."""
    state = current_state(hooks)
    if state is None or state.plan is None:
        added: Tensor = stock(states, visual_pos_masks, planes)
        return added
    mask = visual_pos_masks.to(states.device)[..., None]
    full = states.new_zeros(*mask.shape[:2], states.shape[2])
    full = full.masked_scatter(mask, planes.to(states.device, states.dtype))
    return states + state.plan.to(states.device).reduce(full)
