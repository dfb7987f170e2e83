"""Co-attention between text and image, reduced on the joint token axis: METER's fusion layers, and
the cross-modal layers of BridgeTower."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.base import Patch
from pumer.adapters.encoder import inplace, joint
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import run_block
from pumer.reducers import Plan


def run_layer(
    layer: Any, patch: Patch, layer_index: int, text: Tensor, image: Tensor, layout: EncoderLayout
) -> tuple[Tensor, Tensor, EncoderLayout]:
    """Replaces `MeterFusionLayer.forward`, and the gradient checkpointing that transformers wraps
    around it."""
    return run_block(layer, partial(_block, layer, patch, layer_index), text, image, layout)


def _block(
    layer: Any, patch: Patch, layer_index: int, text: Tensor, image: Tensor, layout: EncoderLayout
) -> tuple[Tensor, Tensor, EncoderLayout]:
    """One fusion layer."""
    new_text, image, layout, text = run_text(
        layer.text, patch, layer_index, text, image, layout, sequential=layer.sequential
    )
    image, layout = run_image(layer.image, patch, layer_index, image, text, layout)
    return reduce_after(patch, layer_index, new_text, image, layout)


def run_text(
    half: Any,
    patch: Patch,
    layer_index: int,
    text: Tensor,
    image: Tensor,
    layout: EncoderLayout,
    sequential: bool = False,
) -> tuple[Tensor, Tensor, EncoderLayout, Tensor]:
    """The text half of a layer: new text, image, layout, and the text that the image attends to.

    Reduces after the text's attention, before the text's MLP and the image half. The image attends
    to the text before this layer, then as short as the new one, or with `sequential` to the new.
    """
    # Self-attention, then attention to the image.
    attended, text_keys, layout = _attend_to(
        half, patch, layer_index, "text_self", text, text, layout
    )[:3]
    attended, image_keys, layout, queries, attention = _attend_to(
        half, patch, layer_index, "text_cross", attended, image, layout
    )
    if not patch.traits.post_layer:
        before = layout
        keys = torch.cat([text_keys, image_keys], dim=2)
        shown = attention if patch.traits.needs_attention else None
        attended, image, layout, plan = _reduce(
            patch, layer_index, attended, image, layout, queries, keys, shown
        )
        if plan is not None and not sequential:
            head = plan.head(before.text, layout.text)
            text = head.reduce(before.pad(text, slice(0, before.text)))
            text = layout.pack(text, slice(0, layout.text))
    new_text = _feed_forward(half, attended)
    return new_text, image, layout, new_text if sequential else text


def run_image(
    half: Any, patch: Patch, layer_index: int, image: Tensor, text: Tensor, layout: EncoderLayout
) -> tuple[Tensor, EncoderLayout]:
    """The image half of a layer: self-attention, then attention to the text, both with the tokens
    that are left."""
    image, _, layout = _attend_to(half, patch, layer_index, "image_self", image, image, layout)[:3]
    image, _, layout = _attend_to(half, patch, layer_index, "image_cross", image, text, layout)[:3]
    return _feed_forward(half, image), layout


def reduce_after(
    patch: Patch, layer_index: int, text: Tensor, image: Tensor, layout: EncoderLayout
) -> tuple[Tensor, Tensor, EncoderLayout]:
    """Text, image and layout after a layer, for reducers that act there."""
    if not patch.traits.post_layer:
        return text, image, layout
    return _reduce(patch, layer_index, text, image, layout)[:3]


def _reduce(
    patch: Patch,
    layer_index: int,
    text: Tensor,
    image: Tensor,
    layout: EncoderLayout,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor, EncoderLayout, Plan | None]:
    """Text, image, layout and plan after the reducer acted in this layer."""
    if not patch.reducer.reduces_at(layer_index):
        return text, image, layout, None
    states = torch.cat([text, image], dim=1)
    states, layout, plan = encoder.reduce(
        patch, layer_index, states, layout, queries, keys, attention, cross=True
    )
    return *joint.split(states, layout), layout, plan


def _attend_to(
    half: Any,
    patch: Patch,
    layer_index: int,
    name: str,
    states: Tensor,
    other: Tensor,
    layout: EncoderLayout,
) -> tuple[Tensor, Tensor, EncoderLayout, Tensor, Tensor | None]:
    """One of a layer's four attentions -> states, keys, layout, queries, and probabilities.

    Args:
        half: of the layer, for the stream of the queries.
        name: of the attention: "text_self", "text_cross", "image_self" or "image_cross".
        states: of the queries.
        other: of the keys and values.
    """
    stream, _, at = name.partition("_")
    is_self_attention = at == "self"
    of_text = is_self_attention == (stream == "text")
    columns = {"text": slice(0, layout.text), "image": slice(layout.text, None)}
    head_mask, layout = encoder.head_mask(
        patch,
        layer_index,
        name,
        layout,
        states,
        other,
        columns[stream],
        columns["text" if of_text else "image"],
    )
    states, queries, keys, attention = _attend(
        half.attention if is_self_attention else half.crossattention,
        patch,
        states,
        other,
        layout,
        columns[stream],
        columns["text" if of_text else "image"],
        of_text,
        is_self_attention,
        head_mask,
    )
    return states, keys, layout, queries, attention


def _attend(
    attention: Any,
    patch: Patch,
    states: Tensor,
    other: Tensor,
    layout: EncoderLayout,
    queries_at: slice,
    keys_at: slice,
    of_text: bool,
    is_self_attention: bool,
    head_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Replaces `BertAttention.forward` -> states, queries, keys, probabilities.

    Args:
        queries_at, keys_at: where queries and keys are on the joint axis.
        of_text: whether keys and values are of the text, else of the image.
        is_self_attention: whether `other` is `states`.
        head_mask: 1 or 0 for every head, [B,H]; None for all.
    """
    module = attention.self
    queries, keys, values = (
        project(inputs).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for project, inputs in (
            (module.query, states),
            (module.key, other),
            (module.value, other),
        )
    )
    context, probabilities = joint.attend(
        patch,
        layout,
        queries,
        keys,
        values,
        queries_at,
        keys_at,
        dtype=states.dtype,
        is_self_attention=is_self_attention,
        padded=of_text,  # images have no padding
        dropout=module.dropout.p if module.training else 0.0,
        head_mask=head_mask,
    )
    output = attention.output
    projected = output.dropout(output.dense(context))
    return output.LayerNorm(inplace.add(projected, states)), queries, keys, probabilities


def _feed_forward(half: Any, states: Tensor) -> Tensor:
    """Replaces `BertIntermediate.forward` and `BertOutput.forward`."""
    inner = inplace.activate(half.intermediate.intermediate_act_fn, half.intermediate.dense(states))
    output = half.output
    return output.LayerNorm(inplace.add(output.dropout(output.dense(inner)), states))
