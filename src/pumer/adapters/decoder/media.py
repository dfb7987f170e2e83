"""What stands in for the methods of a trunk that turn images into embeddings, and mark where they
go.

Each gets the hooks of the model (`hooks.DecoderHooks`), whose call it belongs to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.decoder import prefill
from pumer.adapters.decoder.prompt import ForwardState, current_state
from pumer.adapters.forward import no_autocast

Hooks = Any


def image_features(
    trunk: Any, stock: Callable[..., Any], hooks: Hooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_image_features`: the same, and the images recorded."""
    spec = hooks.spec
    names = list(inspect.signature(type(trunk).get_image_features).parameters)[1:]

    def on_host(name: str, value: Any) -> Any:
        return value.cpu() if name in spec.on_host and isinstance(value, Tensor) else value

    args = tuple(on_host(name, value) for name, value in zip(names, args, strict=False))
    kwargs = {name: on_host(name, value) for name, value in kwargs.items()}
    inputs = dict(zip(names, args, strict=False)) | kwargs
    with hooks.capture.call(inputs) as captured:
        output = stock(*args, **kwargs)
        # A replica has no parameters that would say where it is.
        device = next(
            value.device
            for value in inputs.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        no_cast = no_autocast(hooks.patch.reducer, device)
        with hooks.patch.timing("decoder"), torch.no_grad(), no_cast:
            images = spec.image_spans(trunk, output, captured)
        if captured.merged is not None:
            images = [
                replace(image, merged=merged)
                for image, merged in zip(images, captured.merged, strict=True)
            ]
    state = current_state(hooks)
    if state is not None and (state.trunk_entered or spec.merges_images):
        state.tower_images = images
    hooks.encoded.remember(output, images)  # for those who give it as `mm_encoder_outputs`
    return output


def video_features(
    trunk: Any, stock: Callable[..., Any], hooks: Hooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_video_features`, which may call `get_image_features`: the call keeps its
    images."""
    state = current_state(hooks)
    images = None if state is None else state.tower_images
    with hooks.capture.of_video():
        output = stock(*args, **kwargs)
    if state is not None and images is not None:
        state.tower_images = images
    return output


def placeholder_mask(
    trunk: Any, stock: Callable[..., Any], hooks: Hooks, *args: Any, **kwargs: Any
) -> Any:
    """In place of `get_placeholder_mask`: the same masks, in the one transfer to the host that the
    prefill needs anyway."""
    state = current_state(hooks)
    arguments = (
        inspect.signature(type(trunk).get_placeholder_mask).bind(trunk, *args, **kwargs).arguments
    )
    features = arguments.get("image_features")
    if state is None or not state.trunk_entered or features is None:
        return stock(*args, **kwargs)
    masks = hooks.spec.placeholder_mask(
        trunk, arguments.get("input_ids"), arguments["inputs_embeds"]
    )
    with hooks.patch.timing("decoder"):
        num_features = features.numel() // features.shape[-1]
        prefill.begin_prefill(hooks.spec, trunk, state, masks[0], num_features)
    columns = tuple(mask[..., None] for mask in masks)
    return columns if len(columns) > 1 else columns[0]


def find_placeholders(hooks: Hooks, state: ForwardState, embeddings: Tensor) -> None:
    """Begin the prefill of a family whose placeholders are marked by a method that is not told of
    the features: behind it."""
    with hooks.patch.timing("decoder"):
        image, *_ = hooks.spec.placeholder_mask(
            hooks.trunk, state.inputs.get("input_ids"), embeddings
        )
        state.tower_images = hooks.spec.spans_in_prompt(state.tower_images, image, state.inputs)
        num_features = sum(span.length for span in state.tower_images)
        encoded = (state.inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:  # beams bring the features of their images again
            features = encoded.pooler_output
            parts = [features] if isinstance(features, Tensor) else features
            num_features = sum(part.numel() // part.shape[-1] for part in parts)
        prefill.begin_prefill(hooks.spec, hooks.trunk, state, image, num_features)


def inputs_merger(
    trunk: Any,
    stock: Callable[..., Any],
    hooks: Hooks,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    image_hidden_states: Tensor,
) -> Tensor:
    """In place of `inputs_merger`, which also puts the features there."""
    state = current_state(hooks)
    if state is None or not state.trunk_entered:
        merged: Tensor = stock(input_ids, inputs_embeds, image_hidden_states)
        return merged
    image, *_ = hooks.spec.placeholder_mask(trunk, input_ids, inputs_embeds)
    features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
    with hooks.patch.timing("decoder"):
        num_features = features.numel() // features.shape[-1]
        prefill.begin_prefill(hooks.spec, trunk, state, image, num_features)
    return inputs_embeds.masked_scatter(image[..., None], features)


def deepstack(
    language: Any,
    stock: Callable[..., Any],
    hooks: Hooks,
    states: Tensor,
    visual_pos_masks: Tensor,
    planes: Tensor,
) -> Tensor:
    """In place of `_deepstack_process`, which adds visual features to the states of a layer."""
    state = current_state(hooks)
    if state is None or state.plan is None:
        added: Tensor = stock(states, visual_pos_masks, planes)
        return added
    return states + of_kept(state, states, visual_pos_masks[..., None], planes)


def of_kept(state: ForwardState, states: Tensor, mask_BS1: Tensor, features: Tensor) -> Tensor:
    """Features of all placeholders, for the tokens that are left; zeros at the others."""
    full = states.new_zeros(*mask_BS1.shape[:2], states.shape[2])
    full = full.masked_scatter(mask_BS1.to(states.device), features.to(full))
    return full if state.plan is None else state.plan.to(states.device).reduce(full)
