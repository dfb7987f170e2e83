"""ViLT (Kim, Son, Kim, ICML 2021) as transformers has it.

Shape suffixes: B batch, T text tokens, I image tokens, N = T + I, D channels, H heads, C channels
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pumer.adapters.base import Adapter, Patch, config_of, is_a, register
from pumer.adapters.encoder import inplace, joint
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.joint import TextInputs
from pumer.adapters.encoder.patches import embed_patches
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import exactly_one, max_length, run_block
from pumer.adapters.macs import attention_and_mlp_lengths, head_macs
from pumer.reducers import EMBEDDINGS

POOLED = (
    "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification",
    "ViltForImageAndTextRetrieval",
    "ViltForVisualEntailment",
)
"""Classes whose output depends on the pooled text [CLS] alone: no output has a token axis."""
PER_TOKEN = ("ViltModel", "ViltForMaskedLM", "ViltForTokenClassification")
OFFICIAL_EPS = 1e-6
"""Layer-norm epsilon of the published blocks; transformers uses 1e-12."""


@register
class ViltAdapter(Adapter):
    """All stock ViLT classes."""

    family = "ViLT"
    packs = True
    classes = POOLED + PER_TOKEN
    modules: ClassVar[dict[str, str]] = {"ViltForVisualEntailment": "pumer.models.vilt.entailment"}
    separate = ("ViltForImagesAndTextClassification",)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(_vilt(model).encoder.layer)

    def patch(self, model: nn.Module, patch: Patch) -> None:
        vilt = _vilt(model)
        patch.replace(vilt, "forward", _forward, patch, is_a(model, POOLED))
        patch.wrap(vilt.embeddings, "forward", _embed)
        official = patch.traits.official
        for layer_index, layer in enumerate(vilt.encoder.layer):
            patch.replace(layer, "forward", _layer, patch, layer_index)
            patch.replace(layer.intermediate, "forward", _intermediate)
            patch.replace(layer.output, "forward", _output)
            if official:
                patch.set(layer.layernorm_before, "eps", OFFICIAL_EPS)
                patch.set(layer.layernorm_after, "eps", OFFICIAL_EPS)
        if official:
            patch.set(vilt.layernorm, "eps", OFFICIAL_EPS)

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        limit = config_of(model).max_image_length
        patches = (
            min(rows * columns, limit) if isinstance(limit, int) and limit > 0 else rows * columns
        )
        return config_of(model).max_position_embeddings, patches + 1

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        width, inner = config_of(model).hidden_size, config_of(model).intermediate_size
        return [
            (
                4 * sum(before) * width**2 + 2 * sum(before) ** 2 * width,
                2 * sum(after) * width * inner,
            )
            for before, after in attention_and_mlp_lengths(lengths, after_layer)
        ]

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        config, vilt, forwards_per_example = (
            config_of(model),
            _vilt(model),
            self.forwards_per_example(model),
        )
        text, image = entry or lengths[0]
        layers = self.layer_macs(model, lengths, after_layer)
        patch_size = config.num_channels * config.patch_size**2
        # A head on the pooled state works once per example, one on the states once per text token.
        times = text if is_a(model, PER_TOKEN) else 1
        pooler = config.hidden_size**2 if vilt.pooler is not None else 0
        return {
            "embedding": forwards_per_example * (image - 1) * patch_size * config.hidden_size,
            "attention": forwards_per_example * sum(attention for attention, _ in layers),
            "mlp": forwards_per_example * sum(mlp for _, mlp in layers),
            "head": forwards_per_example * pooler + times * head_macs(model, vilt),
        }


def _vilt(model: nn.Module) -> Any:
    return model if hasattr(model, "encoder") else model.vilt


@dataclass(frozen=True)
class ViltInputs:
    """What `ViltModel.forward` is called with, in its order."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    image_token_type_idx: int | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None

    @property
    def text(self) -> TextInputs:
        """The inputs of the text embeddings."""
        return TextInputs(
            self.input_ids, self.attention_mask, self.token_type_ids, self.inputs_embeds
        )

    @property
    def image(self) -> Tensor:
        """Pixels, or embedded patches; raises ValueError unless exactly one of them is given."""
        return exactly_one(pixel_values=self.pixel_values, image_embeds=self.image_embeds)

    def to(self, device: torch.device, non_blocking: bool = False) -> ViltInputs:
        """The inputs on another device; hooks that move a module's inputs to its weights call
        this."""
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)


_INPUTS = frozenset(field.name for field in fields(ViltInputs))


def _forward(vilt: Any, patch: Patch, pooled: bool, *args: Any, **kwargs: Any) -> Any:
    """Replaces `ViltModel.forward`, and `ViltEncoder` inside it.

    `pooled`: only the pooled output is used, so the text may be cut and states need not be
    expanded.
    """
    inputs = ViltInputs(*args, **{name: x for name, x in kwargs.items() if name in _INPUTS})
    config, text = vilt.config, inputs.text.tokens
    attentions, hidden, wants_dict = (
        getattr(config, name) if getattr(inputs, name) is None else getattr(inputs, name)
        for name in ("output_attentions", "output_hidden_states", "return_dict")
    )
    if attentions and patch.pack:
        raise ValueError(
            "packed rows have no attention maps of one shape: call pumer.apply(model, reducer) "
            "without pack=True, or leave out output_attentions"
        )
    if len(text) != len(inputs.image):
        raise ValueError(
            f"{len(text)} texts and {len(inputs.image)} images: the batch sizes must agree"
        )
    states, layout, all_states, all_attentions = _encode(
        vilt,
        patch,
        text.shape[1],
        # Passed on without a name: nothing here keeps the first states alive while layers run.
        vilt.embeddings(inputs, patch=patch, pooled=pooled),
        attentions,
        hidden,
    )
    states, layout = encoder.unpack(vilt.layernorm(states), layout)
    pooler_output = vilt.pooler(states) if vilt.pooler is not None else None
    output = BaseModelOutputWithPooling(
        last_hidden_state=states if pooled else layout.expand(states),
        pooler_output=pooler_output,
        hidden_states=all_states,
        attentions=all_attentions,
    )
    if wants_dict:
        return output
    return (
        output.last_hidden_state,
        pooler_output,
        *(x for x in (all_states, all_attentions) if x is not None),
    )


def _embed(
    embeddings: Any,
    stock: Callable[..., Any],
    *args: Any,
    patch: Patch | None = None,
    **kwargs: Any,
) -> Any:
    """Wraps `ViltEmbeddings.forward`: for `_forward`, states [B,N,D] and their layout.

    `_forward` calls the module itself, because offload hooks load its parameters only for a call.
    """
    if patch is None:
        return stock(*args, **kwargs)
    return _embed_trimmed(embeddings, patch, *args, **kwargs)


def _embed_trimmed(
    embeddings: Any, patch: Patch, inputs: ViltInputs, pooled: bool
) -> tuple[Tensor, EncoderLayout]:
    """States [B,N,D] and their layout, without the padding that all texts and all images share."""
    # Image: patch embeddings [B,I,D], their mask, and where each patch lies.
    text = inputs.text
    text_mask = text.mask
    if inputs.image_embeds is None:
        image_embeds, image_mask, patch_BI, grid = embed_patches(
            embeddings, inputs.image, inputs.pixel_mask
        )
    else:
        image_embeds, pixel_mask = inputs.image_embeds, inputs.pixel_mask
        if pixel_mask is None:
            pixel_mask = torch.ones(image_embeds.shape[:2], device=image_embeds.device)
        image_mask, patch_BI, grid = pixel_mask.flatten(1).bool(), None, None
    if patch.trim and not torch.compiler.is_compiling():
        # The only host-device sync of the forward; trim=False avoids it.
        text_length, image_length = torch.stack(
            [max_length(text_mask), max_length(image_mask)]
        ).tolist()
        image_embeds, image_mask = image_embeds[:, :image_length], image_mask[:, :image_length]
        patch_BI = None if patch_BI is None else patch_BI[:, :image_length]
        if pooled and not patch.traits.official:  # the published code counts padded text
            text, text_mask = text.trimmed(text_length), text_mask[:, :text_length]
    text_embeds = embeddings.text_embeddings(**text.embedded)
    # Both with the embedding of their modality, text first: [B,T+I,D].
    image_type = 1 if inputs.image_token_type_idx is None else inputs.image_token_type_idx
    type_embeds = embeddings.token_type_embeddings(
        torch.arange(image_type + 1, device=text_embeds.device)
    )
    states = torch.cat([text_embeds + type_embeds[0], image_embeds + type_embeds[image_type]], 1)
    if patch_BI is not None:
        patch_BI = nn.functional.pad(patch_BI, (text_embeds.shape[1], 0), value=-1)
    return states, joint.joint_layout(patch, text_mask, image_mask, grid, patch_BI)


def _encode(
    vilt: Any,
    patch: Patch,
    text: int,
    start: tuple[Tensor, EncoderLayout],
    attentions: bool,
    hidden: bool,
) -> tuple[Tensor, EncoderLayout, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Runs all layers. Hidden states are expanded to the original length, attention maps are not.

    `text`: text tokens of the input, before trimming.
    """
    # Before the first layer.
    entry = (*start[1].lengths, start[1].grid)
    states, layout = encoder.pack(patch, *encoder.reduce(patch, EMBEDDINGS, *start)[:2])
    del start
    all_states, all_attentions, layouts = (
        [layout.expand(states)] if hidden else [],
        [],
        [layout],
    )
    # Every layer returns fewer tokens, or as many, with their layout.
    for layer in vilt.encoder.layer:
        states, layout, attention = layer(states, layout, attentions)
        layouts.append(layout)
        if hidden:
            all_states.append(layout.expand(states))
        if attentions:
            all_attentions.append(attention)
    # For `report`, `kept` and the budget loss.
    patch.record_lengths(layouts)
    patch.entry, patch.kept = entry, layout.places(entry[0], text)
    patch.record_decisions(layout.keep_ratios, layout.heads)
    return (
        states,
        layout,
        tuple(all_states) if hidden else None,
        tuple(all_attentions) if attentions else None,
    )


def _layer(
    layer: Any,
    patch: Patch,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
    attentions: bool = False,
) -> tuple[Tensor, EncoderLayout, Tensor | None]:
    """Replaces `ViltLayer.forward`, and the gradient checkpointing that transformers wraps around
    it."""
    return run_block(layer, partial(_block, layer, patch, layer_index), states, layout, attentions)


def _block(
    layer: Any,
    patch: Patch,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
    attentions: bool,
) -> tuple[Tensor, EncoderLayout, Tensor | None]:
    """One block; the stock forward has no hook between attention and MLP."""
    states, layout, attention = _attend_and_reduce(
        layer, patch, layer_index, states, layout, attentions
    )
    states = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
    if patch.traits.post_layer:
        states, layout, _ = encoder.reduce(patch, layer_index, states, layout)
    return states, layout, attention


def _attend_and_reduce(
    layer: Any,
    patch: Patch,
    layer_index: int,
    states: Tensor,
    layout: EncoderLayout,
    attentions: bool,
) -> tuple[Tensor, EncoderLayout, Tensor | None]:
    """The first half of a block, in a function so that its large tensors are freed before the
    MLP."""
    text, image = slice(0, layout.text), slice(layout.text, None)
    head_mask, layout = encoder.head_mask(
        patch,
        layer_index,
        "joint",
        layout,
        layout.stream(states, text),
        layout.stream(states, image),
        text,
        image,
    )
    states, queries, keys, attention = _attend(layer, patch, states, layout, attentions, head_mask)
    # Without `needs_attention` reducers score by queries and keys: the kernel makes no difference.
    shown = attention if patch.traits.needs_attention else None
    if not patch.traits.post_layer:
        states, layout, _ = encoder.reduce(patch, layer_index, states, layout, queries, keys, shown)
    return states, layout, attention if attentions else None


def _attend(
    layer: Any,
    patch: Patch,
    states: Tensor,
    layout: EncoderLayout,
    attentions: bool,
    head_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The attention of a block -> states, queries, keys, and the probabilities if computed."""
    module = layer.attention.attention
    normed = layer.layernorm_before(states)
    queries, keys, values = (
        project(normed).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for project in (module.query, module.key, module.value)
    )
    context, attention = joint.attend(
        patch,
        layout,
        queries,
        keys,
        values,
        encoder.ALL,
        encoder.ALL,
        dtype=states.dtype,
        is_self_attention=True,
        dropout=module.dropout.p if module.training else 0.0,
        probabilities=attentions,
        head_mask=head_mask,
    )
    return inplace.add(layer.attention.output(context, states), states), queries, keys, attention


def _intermediate(intermediate: Any, hidden_states: Tensor) -> Tensor:
    """Replaces `ViltIntermediate.forward`."""
    return inplace.activate(intermediate.intermediate_act_fn, intermediate.dense(hidden_states))


def _output(output: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """Replaces `ViltOutput.forward`."""
    return inplace.add(output.dropout(output.dense(hidden_states)), input_tensor)
