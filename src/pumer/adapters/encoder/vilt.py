"""ViLT (Kim, Son, Kim, ICML 2021) as transformers has it.

Shape suffixes: B batch, T text tokens, I image tokens, N = T + I, D channels, H heads, C channels
of a head, R rows, L columns of patches, P = R * L patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pumer.adapters.base import (
    Adapter,
    Patch,
    config_of,
    exactly_one,
    extent,
    head_macs,
    inside,
    is_a,
    register,
    run_block,
)
from pumer.adapters.encoder import attention as probes
from pumer.adapters.encoder import inplace
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.reduce import Axis
from pumer.reducers import EMBEDDINGS, Reducer
from pumer.reducers.plan import tokens_at

POOLED = (
    "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification",
    "ViltForImageAndTextRetrieval",
    "ViltForVisualEntailment",
)
"""Classes whose answer leaves through the pooled text [CLS] alone: nothing with a token axis comes
out."""
PER_TOKEN = ("ViltModel", "ViltForMaskedLM", "ViltForTokenClassification")
PUBLISHED_EPS = 1e-6
"""Layer-norm epsilon of the published blocks; transformers has 1e-12 for them."""


@register
class ViltAdapter(Adapter):
    """All stock ViLT classes."""

    family = "ViLT"
    classes = POOLED + PER_TOKEN
    modules: ClassVar[dict[str, str]] = {"ViltForVisualEntailment": "pumer.models.vilt.entailment"}
    separate = ("ViltForImagesAndTextClassification",)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(_vilt(model).encoder.layer)

    def settle(self, reducer: Reducer) -> Reducer:
        if getattr(reducer, "official", False) == "meter":
            raise ValueError(
                "official='meter' is METER's published reducer: give ViLT official=True"
            )
        return reducer

    def patch(self, model: nn.Module, patch: Patch) -> None:
        vilt = _vilt(model)
        patch.replace(vilt, "forward", _forward, patch, is_a(model, POOLED))
        patch.wrap(vilt.embeddings, "forward", _embed)
        published = patch.reducer.published
        for layer_index, layer in enumerate(vilt.encoder.layer):
            patch.replace(layer, "forward", _layer, patch, layer_index, published)
            patch.replace(layer.intermediate, "forward", _intermediate)
            patch.replace(layer.output, "forward", _output)
            if published:
                patch.set(layer.layernorm_before, "eps", PUBLISHED_EPS)
                patch.set(layer.layernorm_after, "eps", PUBLISHED_EPS)
        if published:
            patch.set(vilt.layernorm, "eps", PUBLISHED_EPS)

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
            for before, after in inside(lengths, after_layer)
        ]

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        config, vilt, passes = config_of(model), _vilt(model), self.passes(model)
        text, image = entry or lengths[0]
        layers = self.layer_macs(model, lengths, after_layer)
        patch_size = config.num_channels * config.patch_size**2
        # A head on the pooled state works once per example, one on the states once per text token.
        times = text if is_a(model, PER_TOKEN) else 1
        pooler = config.hidden_size**2 if vilt.pooler is not None else 0
        return {
            "embedding": passes * (image - 1) * patch_size * config.hidden_size,
            "attention": passes * sum(attention for attention, _ in layers),
            "mlp": passes * sum(mlp for _, mlp in layers),
            "head": passes * pooler + times * head_macs(model, vilt),
        }


def _vilt(model: nn.Module) -> Any:
    return model if hasattr(model, "encoder") else model.vilt


def _forward(
    vilt: Any,
    patch: Patch,
    pooled: bool,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    image_embeds: Tensor | None = None,
    image_token_type_idx: int | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """In place of `ViltModel.forward`, and of `ViltEncoder` inside it.

    `pooled`: only the pooled output is used, so the text may be cut and states need not be
    expanded.
    """
    config = vilt.config
    attentions = config.output_attentions if output_attentions is None else output_attentions
    hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    text = exactly_one(input_ids=input_ids, inputs_embeds=inputs_embeds)
    image = exactly_one(pixel_values=pixel_values, image_embeds=image_embeds)
    if len(text) != len(image):
        raise ValueError(f"{len(text)} texts and {len(image)} images: the batch sizes must agree")
    states, axis, all_states, all_attentions = _encode(
        vilt,
        patch,
        text.shape[1],
        # Handed on unnamed, so that nothing here holds the states of the first layer while the
        # others run.
        vilt.embeddings(
            input_ids=input_ids,
            attention_mask=encoder.check_mask(attention_mask, text),
            token_type_ids=token_type_ids,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            image_token_type_idx=image_token_type_idx,
            patch=patch,
            pooled=pooled,
        ),
        attentions,
        hidden,
    )
    states = vilt.layernorm(states)
    pooler_output = vilt.pooler(states) if vilt.pooler is not None else None
    output = BaseModelOutputWithPooling(
        last_hidden_state=states if pooled else axis.expand(states),
        pooler_output=pooler_output,
        hidden_states=all_states,
        attentions=all_attentions,
    )
    wants_dict = config.return_dict if return_dict is None else return_dict
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
    """In place of `ViltEmbeddings.forward`, for a reduced model's own call: states [B,N,D] and
    their axis.

    A module is called for it, since offload hooks bring in its parameters for a call alone.
    """
    return stock(*args, **kwargs) if patch is None else _embed_trimmed(embeddings, patch, **kwargs)


def _embed_trimmed(
    embeddings: Any,
    patch: Patch,
    pooled: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor,
    token_type_ids: Tensor | None,
    pixel_values: Tensor | None,
    pixel_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    image_embeds: Tensor | None,
    image_token_type_idx: int | None,
) -> tuple[Tensor, Axis]:
    """States [B,N,D] and their axis, without the padding that all texts and all pictures have at
    the end."""
    published = patch.reducer.published
    image = exactly_one(pixel_values=pixel_values, image_embeds=image_embeds)
    if image_embeds is None:
        image_embeds, image_mask, patch_BI, grid = embed_patches(embeddings, image, pixel_mask)
    else:
        if pixel_mask is None:
            pixel_mask = torch.ones(image.shape[:2], device=image.device)
        image_mask, patch_BI, grid = pixel_mask.flatten(1).bool(), None, None
    if patch.trim and not torch.compiler.is_compiling():
        # The one place where the host reads lengths; a collator that trims, or trim=False, saves
        # even that.
        text_length, image_length = torch.stack(
            [extent(attention_mask), extent(image_mask)]
        ).tolist()
        image_embeds, image_mask = image_embeds[:, :image_length], image_mask[:, :image_length]
        patch_BI = None if patch_BI is None else patch_BI[:, :image_length]
        if pooled and not published:  # the published code counts padded text
            attention_mask = attention_mask[:, :text_length]
            input_ids, token_type_ids, inputs_embeds = (
                None if x is None else x[:, :text_length]
                for x in (input_ids, token_type_ids, inputs_embeds)
            )
    text_embeds = embeddings.text_embeddings(
        input_ids=input_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
    )
    image_kind = 1 if image_token_type_idx is None else image_token_type_idx
    kinds = embeddings.token_type_embeddings(
        torch.arange(image_kind + 1, device=text_embeds.device)
    )
    states = torch.cat([text_embeds + kinds[0], image_embeds + kinds[image_kind]], dim=1)
    if patch_BI is not None:
        patch_BI = torch.nn.functional.pad(patch_BI, (text_embeds.shape[1], 0), value=-1)
    mask = torch.cat([attention_mask.bool(), image_mask], dim=1)
    axis = Axis(
        text_embeds.shape[1], mask, torch.ones_like(mask, dtype=torch.float32), None, grid, patch_BI
    )
    if published:
        axis = replace(axis, mask_BN=torch.cat([attention_mask.float(), image_mask.float()], dim=1))
    return states, axis


def _encode(
    vilt: Any, patch: Patch, text: int, start: tuple[Tensor, Axis], attentions: bool, hidden: bool
) -> tuple[Tensor, Axis, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """All layers; hidden states come back in the original length, attention maps in the reduced
    one.

    `text`: text tokens of the input, before they were trimmed.
    """
    entry = (*start[1].lengths, start[1].grid)
    states, axis, _ = encoder.reduce(patch, EMBEDDINGS, *start)
    del start
    all_states, all_attentions, lengths = (
        [axis.expand(states)] if hidden else [],
        [],
        [axis.lengths],
    )
    for layer in vilt.encoder.layer:
        states, axis, attention = layer(states, axis, attentions)
        lengths.append(axis.lengths)
        if hidden:
            all_states.append(axis.expand(states))
        if attentions:
            all_attentions.append(attention)
    patch.lengths, patch.entry, patch.kept = lengths, entry, axis.places(entry[0], text)
    patch.note(axis.spent, axis.heads)
    return (
        states,
        axis,
        tuple(all_states) if hidden else None,
        tuple(all_attentions) if attentions else None,
    )


def _layer(
    layer: Any,
    patch: Patch,
    layer_index: int,
    published: bool,
    states: Tensor,
    axis: Axis,
    attentions: bool = False,
) -> tuple[Tensor, Axis, Tensor | None]:
    """In place of `ViltLayer.forward`, and of the gradient checkpointing that transformers wraps
    around it."""
    return run_block(
        layer, partial(_block, layer, patch, layer_index, published), states, axis, attentions
    )


def _block(
    layer: Any,
    patch: Patch,
    layer_index: int,
    published: bool,
    states: Tensor,
    axis: Axis,
    attentions: bool,
) -> tuple[Tensor, Axis, Tensor | None]:
    """One block: the stock one has no opening between attention and MLP."""
    states, axis, attention = _attend_and_reduce(
        layer, patch, layer_index, published, states, axis, attentions
    )
    states = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
    if patch.reducer.after_layer:
        states, axis, _ = encoder.reduce(patch, layer_index, states, axis)
    return states, axis, attention


def _attend_and_reduce(
    layer: Any,
    patch: Patch,
    layer_index: int,
    published: bool,
    states: Tensor,
    axis: Axis,
    attentions: bool,
) -> tuple[Tensor, Axis, Tensor | None]:
    """Parts of a block are functions of their own, so that large tensors of one are gone when the
    next one runs."""
    text, image = slice(0, axis.text), slice(axis.text, None)
    heard, axis = encoder.hear(
        patch, layer_index, "joint", axis, states[:, text], states[:, image], text, image
    )
    states, queries, keys, attention = _attend(
        layer, patch, published, states, axis, attentions, heard
    )
    # Scores come from queries and keys wherever they can, so that the kernel makes no difference to
    # what is kept.
    looked_at = attention if patch.reducer.needs_attention else None
    if not patch.reducer.after_layer:
        states, axis, _ = encoder.reduce(patch, layer_index, states, axis, queries, keys, looked_at)
    return states, axis, attention if attentions else None


def _attend(
    layer: Any,
    patch: Patch,
    published: bool,
    states: Tensor,
    axis: Axis,
    attentions: bool,
    heard: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The attention half of a block -> states, queries, keys, and the probabilities if somebody
    wants them."""
    module = layer.attention.attention
    normed = layer.layernorm_before(states)
    queries, keys, values = (
        project(normed).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for project in (module.query, module.key, module.value)
    )
    dropout = module.dropout.p if module.training else 0.0
    attention: Tensor | None
    if axis.gate_BN is not None:
        context, attention = probes.attend_gated(
            queries, keys, values, axis.mask_BN, axis.gate_BN, own=True, dropout=dropout
        )
    elif published:
        context, attention = probes.attend_published(queries, keys, values, axis.mask_BN, dropout)
    else:
        sizes = axis.sizes_BN if patch.reducer.weighs_by_size and axis.plan is not None else None
        attention_bias = probes.visibility(axis.mask_BN, sizes, states.dtype)
        wanted = attentions or patch.reducer.needs_attention
        context, attention = probes.attend(
            queries, keys, values, attention_bias, patch.attention, dropout, wanted
        )
    if heard is not None:
        context = context * heard[..., None, None].to(context.dtype)
    context = context.transpose(1, 2).flatten(2)
    return inplace.add(layer.attention.output(context, states), states), queries, keys, attention


def _intermediate(intermediate: Any, hidden_states: Tensor) -> Tensor:
    """In place of `ViltIntermediate.forward`."""
    return inplace.activate(intermediate.intermediate_act_fn, intermediate.dense(hidden_states))


def _output(output: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """In place of `ViltOutput.forward`."""
    return inplace.add(output.dropout(output.dense(hidden_states)), input_tensor)


def embed_patches(
    embeddings: Any, pixel_values: Tensor, pixel_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """In place of `ViltEmbeddings.visual_embed`: no loop over the batch, no random order, no host
    reads.

    The stock method draws the patches of a picture at random; here they come in raster order, real
    ones first. Of a picture with more patches than `config.max_image_length`, evenly spaced ones
    are taken.

    Args:
        pixel_values: [B,3,height,width].
        pixel_mask: [B,height,width], 1 at real pixels; None where all are real.

    Returns:
        embeddings [B,1+P,D] with [CLS] first, bool mask [B,1+P], raster number of each patch
        [B,1+P] (-1: [CLS]), and rows and columns of patches.
    """
    features = embeddings.patch_embeddings(pixel_values)
    batch, _, rows, columns = features.shape
    if pixel_mask is None:
        real_BRL = torch.ones(batch, rows, columns, dtype=torch.bool, device=features.device)
    else:
        nearest = nn.functional.interpolate(pixel_mask[:, None].float(), size=(rows, columns))
        real_BRL = nearest[:, 0].long() > 0
    table_1P = embeddings.position_embeddings
    side = embeddings.config.image_size // embeddings.config.patch_size
    position_BRLD = _resize_positions(
        table_1P[0, 1:].unflatten(0, (side, side)),
        real_BRL[:, :, 0].sum(1),
        real_BRL[:, 0].sum(1),
        rows,
        columns,
    )
    tokens_BPD = features.flatten(2).transpose(1, 2) + position_BRLD.flatten(1, 2)

    real_BP = real_BRL.flatten(1)
    limit = embeddings.config.max_image_length
    length = real_BP.shape[1]
    if isinstance(limit, int) and 0 < limit < length:
        position_BP, count = real_BP.long().cumsum(1) - 1, real_BP.sum(1, keepdim=True).clamp_min(1)
        kept = count.clamp_max(limit)
        real_BP = real_BP & ((position_BP + 1) * kept // count > position_BP * kept // count)
        length = limit
    order_BP = (~real_BP).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    tokens_BPD, real_BP = tokens_at(tokens_BPD, order_BP), tokens_at(real_BP, order_BP)

    cls_BD = (embeddings.cls_token + table_1P[:, :1]).expand(batch, -1, -1)
    states = embeddings.dropout(torch.cat([cls_BD, tokens_BPD], dim=1))
    mask = nn.functional.pad(real_BP, (1, 0), value=True)
    return states, mask, nn.functional.pad(order_BP, (1, 0), value=-1), (rows, columns)


def _resize_positions(
    table_SSD: Tensor, height_B: Tensor, width_B: Tensor, rows: int, columns: int
) -> Tensor:
    """Bilinear resize (corners aligned) of a square position table to each picture's own size ->
    [B,R,L,D]."""
    side = table_SSD.shape[0]
    down_BRS = _hat_weights(height_B, rows, side)
    across_BLS = _hat_weights(width_B, columns, side)
    stretched = down_BRS @ table_SSD.float().flatten(1)
    return (across_BLS[:, None] @ stretched.unflatten(-1, (side, -1))).to(table_SSD.dtype)


def _hat_weights(size_B: Tensor, length: int, side: int) -> Tensor:
    """Share [B,length,side] of every table entry in every place, for pictures `size_B` patches
    long."""
    position_L = torch.arange(length, device=size_B.device)
    source_BL = position_L * ((side - 1) / (size_B - 1).clamp_min(1))[:, None]
    source_BL = torch.where(size_B[:, None] > 1, source_BL, 0.0).clamp_max(side - 1)
    return (1 - (source_BL[..., None] - torch.arange(side, device=size_B.device)).abs()).clamp_min(
        0
    )
