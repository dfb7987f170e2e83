"""A call through a reduced decoder: what is wrapped and hooked, and what each hands on.

Everything goes through methods and hooks of the instance. A reduction "after layer k" happens
before layer k + 1 runs, with the queries and keys of layer k; `EMBEDDINGS` is before layer 0. The
model itself goes on counting unreduced tokens: masks and rotary embeddings are made by it in full
and sliced here, layer by layer, as are those of the cache (`kv_cache`). Where the patch says so,
positions are then counted anew (`positions`).

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
from functools import partial
from typing import Any

from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder import kv_cache, media, positions, prefill, short_cache, shorten
from pumer.adapters.decoder import output as decoder_output
from pumer.adapters.decoder import reduce as decoder_reduce
from pumer.adapters.decoder.inside_tower import install_tower
from pumer.adapters.decoder.prompt import (
    ForwardState,
    TokenLayout,
    current_state,
    enter_state,
)
from pumer.adapters.decoder.shorten import STATE
from pumer.adapters.decoder.spec import DecoderSpec
from pumer.adapters.decoder.view import LayerAttention
from pumer.adapters.decoder.vision import EncodedImages, VisionCapture
from pumer.adapters.forward import timed
from pumer.reducers import EMBEDDINGS

QUESTION_MASK = "question_mask"
ALONG_TOKENS = ("attention_mask", "position_embeddings", "position_ids")
"""Arguments of a layer that have an entry for every token."""


class DecoderHooks:
    """A reducer at work in one model. It holds what is true of every call; what belongs to one call
    is in its `ForwardState`."""

    def __init__(self, patch: Patch, spec: DecoderSpec, model: nn.Module) -> None:
        self.patch, self.spec = patch, spec
        self.model: Any = model
        self.trunk: Any = spec.trunk(model)
        self.language: Any = spec.language(model)
        self.key_layers = spec.key_layers(model)
        self.capture = VisionCapture(patch.reducer.traits)
        self.encoded = EncodedImages()
        reducer, depth = patch.reducer, len(self.language.layers)
        self.shortens = spec.before_only(model) is not None
        self.acts_after = {layer for layer in range(EMBEDDINGS, depth) if reducer.reduces_at(layer)}
        self.traits = reducer.traits
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        patch, spec = self.patch, self.spec
        trunk, language = self.trunk, self.language
        if model is not trunk:
            parameters = inspect.signature(model.forward)
            patch.wrap(model, "forward", _model_forward, self, parameters, adds=(QUESTION_MASK,))
        parameters = inspect.signature(trunk.forward)
        patch.wrap(trunk, "forward", _trunk_forward, self, parameters, adds=(QUESTION_MASK,))
        patch.wrap(language, "forward", _language_forward, self)
        for layer_index, layer in enumerate(language.layers):
            before_layer = partial(self._before_layer, layer_index)
            if self.shortens:
                before_layer = partial(shorten.before_layer, self)
            patch.hook(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            if layer_index in self.acts_after and self.traits.needs_qk:
                # The log-sum-exp serves causal attention alone: where all tokens see each other it
                # sums over words of the answer, too, which must not guide.
                decoder_attention.capture_qk(
                    patch,
                    layer.self_attn,
                    partial(self._on_qk, layer_index),
                    normalizer=spec.causal,
                )
        self.capture.install(patch, spec, model)
        patch.wrap(trunk, "get_image_features", media.image_features, self)
        if hasattr(trunk, "get_video_features"):
            patch.wrap(trunk, "get_video_features", media.video_features, self)
        if spec.placeholder_hook is not None:
            in_place = spec.placeholder_hook == "get_placeholder_mask"
            find_placeholders = media.placeholder_mask if in_place else media.inputs_merger
            patch.wrap(trunk, spec.placeholder_hook, find_placeholders, self)
        spec.install(patch, model, self.capture)
        install_tower(patch, spec, model, self.capture)
        if hasattr(language, "_deepstack_process"):
            patch.wrap(language, "_deepstack_process", media.deepstack, self)

    def enter(self, begun: Callable[[ForwardState], bool]) -> AbstractContextManager[ForwardState]:
        """The state of the call that is running, or a new one where there is none or it has already
        `begun`."""
        state = current_state(self)
        if state is None or begun(state):
            return enter_state(ForwardState(self))
        return nullcontext(state)

    def begin(self, state: ForwardState, inputs: dict[str, Any]) -> None:
        """Take in the arguments of the trunk.

        Raises:
            ValueError: for inputs that cannot be reduced, before anything is computed.
        """
        inputs["attention_mask"] = prefill.padding_mask(inputs.get("attention_mask"))
        state.trunk_entered, state.inputs = True, inputs
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            state.tower_images = self.encoded.recall(encoded)
        if encoded is not None or inputs.get("pixel_values") is not None:
            decoder_attention.check_backend(self.language.config)
            (short_cache if self.shortens else kv_cache).check(kv_cache.find(inputs))
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
        if state is None or state.layout is None or len(state.layouts) != layer_index + 1:
            return  # nothing to reduce, or the layer is being computed again for its gradients
        state.attention[layer_index] = LayerAttention(
            queries_BHKC,
            keys_BhLC,
            options.get("sliding_window"),
            options.get("softcap"),
            kv_cache.layout(state.cache, layer_index) if state.past else None,
            options.get(decoder_attention.NORMALIZER),
        )

    @timed("decoder")
    def _before_layer(
        self, layer_index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: reduce after the one before it, and select what goes along with the
        tokens."""
        kwargs = dict(kwargs)
        state: ForwardState | None = kwargs.pop(STATE, None) or current_state(self)
        if state is None:
            return args, kwargs
        along_tokens = self.spec.along_tokens
        if len(args) > 1:  # by name, as the others
            names = [*inspect.signature(type(module).forward).parameters][2 : len(args) + 1]
            kwargs |= dict(zip(names, args[1:], strict=True))
            along_tokens = (*along_tokens, *(name for name in names if name not in ALONG_TOKENS))
        states_BKD = states = args[0] if args else kwargs["hidden_states"]
        if states.ndim == 4:  # a token's streams side by side
            states_BKD = states.permute(1, 2, 0, 3).flatten(2)
        if layer_index == 0:
            state.cache, state.length = kv_cache.find(kwargs), states_BKD.shape[1]
            state.past = kv_cache.length(state.cache)
        if state.layout is not None:
            states_BKD = self._reduced(state, layer_index, states_BKD)
        layout = state.layouts[layer_index] if state.layouts else None
        layout = None if layout is None or layout.unreduced else layout
        key_layer = self.key_layers[layer_index]
        cached = kv_cache.layout(state.cache, key_layer) if state.past else None
        if layout is None and cached is None:
            return args[:1], kwargs
        along = {name: kwargs.get(name) for name in ALONG_TOKENS}
        more = {name: kwargs[name] for name in along_tokens if name in kwargs}
        select = partial(self._select, state, key_layer, along, layout, cached, states_BKD)
        selected = state.memoize((*along.values(), layout, cached), select)
        kwargs |= {
            name: value for name, value in selected.items() if name in kwargs or value is not None
        }
        if layout is not None:
            gather = partial(
                decoder_attention.gather_tokens, index_BK=layout.index_BK, length=state.length
            )
            kwargs |= {name: gather(value) for name, value in more.items()}
        if states.ndim == 4:
            states_BKD = states_BKD.unflatten(2, (len(states), -1)).permute(2, 0, 1, 3)
        return ((states_BKD,), kwargs) if args else ((), kwargs | {"hidden_states": states_BKD})

    def _reduced(self, state: ForwardState, layer_index: int, states_BKD: Tensor) -> Tensor:
        """The states that a layer runs on."""
        if layer_index < len(state.layouts):  # computed again for its gradients: the plan stands
            plan = state.plans[layer_index]
            return states_BKD if plan is None else plan.to(states_BKD.device).reduce(states_BKD)
        if layer_index == 0 and self.traits.needs_embeddings:
            state.embeddings_BSD = states_BKD.detach()
        plan, layer = None, layer_index - 1
        if layer in self.acts_after or (
            layer == EMBEDDINGS and decoder_reduce.has_merged_images(state)
        ):
            states_BKD, plan = decoder_reduce.reduce(
                self.patch, state, layer, states_BKD, self.spec.causal
            )
        assert state.layout is not None
        if self.traits.needs_input and layer_index in self.acts_after:
            state.layer_input_BKD = states_BKD.detach()
        state.layouts.append(state.layout)
        state.plans.append(plan)
        state.widths.append(states_BKD.shape[1])
        return states_BKD

    def _select(
        self,
        state: ForwardState,
        layer_index: int,
        along: dict[str, Any],
        layout: TokenLayout | None,
        cached: kv_cache.CacheLayout | None,
        states_BKD: Tensor,
    ) -> dict[str, Any]:
        """Arguments of a layer for the tokens that it has, and those that its cache holds.

        Args:
            along: those of the unreduced model (`ALONG_TOKENS`).
            layout: tokens of the layer; None for those of the prompt.
            cached: what its cache holds; None for every token.
            states_BKD: that it runs on.
        """
        implementation: str = self.language.config._attn_implementation
        position_BL, filled_BL = state.positions_of(layout, len(states_BKD), states_BKD.device)
        offset = 0
        if state.past:
            layer = state.cache.layers[layer_index]
            _, offset = layer.get_mask_sizes(state.length)
            prompt, num_cached = kv_cache.prompt_slots(layer), kv_cache.num_held(layer)
            position_BL, filled_BL = kv_cache.with_cached(
                cached, state.past, num_cached, position_BL, filled_BL, prompt
            )
            if prompt:  # the mask has columns for all of it, and only behind it for a window
                in_window_BL = position_BL >= layer.prefill_length
                position_BL, offset = position_BL - offset * in_window_BL, 0
        selected = dict(along)
        selected["attention_mask"] = decoder_attention.slice_attention_mask(
            along["attention_mask"],
            None if layout is None else layout.index_BK,
            position_BL,
            filled_BL,
            offset,
            state.past,
            state.length,
            implementation,
            states_BKD.dtype,
            self.spec.causal,
        )
        if layout is not None:
            for name in ("position_embeddings", "position_ids"):
                selected[name] = decoder_attention.gather_tokens(
                    along[name], layout.index_BK, state.length
                )
        if self.patch.renumber:
            selected |= positions.renumber(
                self.language, state, layer_index, layout, cached, selected
            )
        if layout is not None and implementation.startswith("flash"):
            # It would take gaps between positions for the ends of packed sequences.
            selected["position_ids"] = None
        return selected


def _bind(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method, by name."""
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
    """In place of the whole model's `forward`: the same, and its arguments recorded.

    A forward hook would miss direct calls of `forward`, as PEFT makes them.
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
    with hooks.enter(lambda state: state.trunk_entered) as state:
        if question_mask is not None:
            state.call_kwargs[QUESTION_MASK] = question_mask
        inputs = _bind(signature, args, kwargs)
        if trunk is hooks.model:  # which has no model around it that would have done so
            state.call_kwargs |= inputs
        hooks.begin(state, inputs)
        return stock(*args, **kwargs)


def _language_forward(
    language: Any, stock: Callable[..., Any], hooks: DecoderHooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of the language model's `forward`: its states come back in the prompt's length."""
    with hooks.enter(lambda state: state.language_entered) as state:
        state.language_entered = True
        if not state.inputs:  # it is called by itself, maybe to go on with a reduced prompt
            state.inputs = dict(kwargs)
        if state.tower_images and hooks.spec.placeholder_hook is None:
            media.find_placeholders(hooks, state, kwargs["inputs_embeds"])
        if hooks.shortens:
            output = shorten.run(hooks, state, stock, args, kwargs)
        else:
            output = stock(*args, **kwargs, **{STATE: state})
        if not isinstance(output, tuple):
            decoder_output.finish(hooks.patch, state, output, kv_cache.find(output))
        return output
