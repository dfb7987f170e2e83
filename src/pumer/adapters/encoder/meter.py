"""METER: reduction in the co-attention layers, and inside its vision tower.

Shape suffixes: B batch, T text tokens, I image tokens, N = T + I, D channels, H heads, C channels
of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Adapter, Patch, config_of, is_a, register
from pumer.adapters.encoder import clip as tower
from pumer.adapters.encoder import joint
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.clip import Encoded
from pumer.adapters.encoder.co_attention import run_layer
from pumer.adapters.encoder.joint import TextInputs
from pumer.adapters.forward import max_length
from pumer.adapters.macs import attention_macs, co_attention_macs, head_macs
from pumer.reducers import EMBEDDINGS

POOLED = (
    "MeterForQuestionAnswering",
    "MeterForImagesAndTextClassification",
    "MeterForVisualEntailment",
    "MeterForImageAndTextRetrieval",
)
"""Classes whose output depends on the pooled states alone: no output has a token axis."""
PER_TOKEN = ("MeterModel", "MeterForMaskedLM")


@register
class MeterAdapter(Adapter):
    """All METER classes of pumer."""

    family = "METER"
    classes = POOLED + PER_TOKEN
    modules: ClassVar[dict[str, str]] = dict.fromkeys(classes, "pumer.models.meter")
    has_cross_attention = True
    packs = True
    separate = ("MeterForImagesAndTextClassification",)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(_meter(model).layers)

    def tower_depth(self, model: nn.Module) -> int:
        return len(_meter(model).vision_model.encoder.layers)

    def tower_attention_shape(self, model: nn.Module) -> tuple[int, int]:
        vision = config_of(model).vision_config
        return vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads

    def patch(self, model: nn.Module, patch: Patch) -> None:
        meter = _meter(model)
        pooled = is_a(model, POOLED)
        patch.replace(meter, "encode_text", _encode_text, patch, pooled)
        patch.replace(meter, "encode_image", _encode_image, patch)
        patch.replace(meter, "fuse", _fuse, patch, pooled)
        for layer_index, layer in enumerate(meter.layers):
            patch.replace(layer, "forward", run_layer, patch, layer_index)

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        return config_of(model).max_position_embeddings, rows * columns + 1

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        config = config_of(model)
        return co_attention_macs(lengths, config.hidden_size, config.intermediate_size, after_layer)

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        config, forwards_per_example = config_of(model), self.forwards_per_example(model)
        text_config, vision = config.text_config, config.vision_config
        text, image = entry or lengths[0]
        tower = tower or [image] * (self.tower_depth(model) + 1)
        # The text is encoded and projected once per example, for any number of images.
        text_layer = attention_macs(text, text, text_config.hidden_size)
        text_layer += 2 * text * text_config.hidden_size * text_config.intermediate_size
        vision_layers = sum(
            attention_macs(before, before, vision.hidden_size)
            + 2 * after * vision.hidden_size * vision.intermediate_size
            for before, after in pairwise(tower)
        )
        patches = (tower[0] - 1) * vision.num_channels * vision.patch_size**2 * vision.hidden_size
        layers = self.layer_macs(model, lengths, after_layer)
        times = text if is_a(model, PER_TOKEN) else 1
        return {
            "embedding": forwards_per_example * patches,
            "text encoder": text_config.num_hidden_layers * text_layer
            + text * text_config.hidden_size * config.hidden_size,
            "vision tower": forwards_per_example * vision_layers,
            "projection": forwards_per_example
            * tower[-1]
            * vision.hidden_size
            * config.hidden_size,
            "attention": forwards_per_example * sum(attention for attention, _ in layers),
            "mlp": forwards_per_example * sum(mlp for _, mlp in layers),
            "head": forwards_per_example * 2 * config.hidden_size**2
            + times * head_macs(model, _meter(model)),
        }


def _meter(model: nn.Module) -> Any:
    return model if hasattr(model, "fuse") else model.meter


def _encode_text(
    meter: Any, patch: Patch, pooled: bool, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Replaces `MeterModel.encode_text`: states of the text, cut to the longest of the batch, and
    its mask, which is not cut."""
    text = TextInputs(*args, **kwargs)
    given_mask = attention_mask = text.mask
    official = patch.traits.official  # the published code counts padded text
    if patch.trim and pooled and not official and not torch.compiler.is_compiling():
        length = int(max_length(attention_mask))
        text, attention_mask = text.trimmed(length), attention_mask[:, :length]
    # A 4D mask is used as it is; for a 2D mask transformers would sync to see if it masks anything.
    dtype = meter.text_projection.weight.dtype
    hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    hidden = hidden.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)
    length = attention_mask.shape[1]
    states = meter.text_model(
        attention_mask=hidden[:, None, None].expand(-1, 1, length, length), **text.embedded
    ).last_hidden_state
    return meter.text_projection(states), given_mask


def _encode_image(
    meter: Any, patch: Patch, pixel_values: Tensor | None, pixel_mask: Tensor | None = None
) -> Encoded:
    """Replaces `MeterModel.encode_image`."""
    from pumer.models.meter.modeling import check_images

    check_images(pixel_values, pixel_mask)
    assert pixel_values is not None
    encoded = tower.encode(meter.vision_model, pixel_values, patch)
    projected = meter.image_projection(encoded.states_BID)
    return replace(encoded.to(projected.device), states_BID=projected)


def _fuse(
    meter: Any,
    patch: Patch,
    pooled: bool,
    text_BTD: Tensor,
    mask_BT: Tensor,
    image: Any,
    image_token_type_idx: int = 1,
    texts_per_image: int = 1,
    output_hidden_states: bool | None = None,
) -> Any:
    """Replaces `MeterModel.fuse`; `image` is the output of `encode_image`, or states from
    elsewhere."""
    from pumer.models.meter.modeling import MeterModelOutput, add_modality, repeat_images

    if output_hidden_states is None:
        output_hidden_states = meter.config.output_hidden_states
    encoded: Encoded = repeat_images(
        image if isinstance(image, Encoded) else Encoded(image), text_BTD, texts_per_image
    )
    # The joint layout of the trimmed text and the image, as the tower has reduced it.
    encoded, given_text, trimmed = encoded.to(text_BTD.device), mask_BT.shape[1], text_BTD.shape[1]
    mask_BT = mask_BT.to(text_BTD.device)[:, :trimmed]
    layout = joint.entry_layout(patch, mask_BT, encoded)
    source = layout.plan.slot_BN.shape[1] if layout.plan is not None else sum(layout.lengths)
    entry = (layout.text, source - layout.text, encoded.grid)
    # Text and image as one axis, reduced before the first layer, and apart again.
    text, image_states = (
        add_modality(meter, text_BTD, 0),
        add_modality(meter, encoded.states_BID, image_token_type_idx),
    )
    states = torch.cat([text, image_states], dim=1)
    states, layout = encoder.pack(patch, *encoder.reduce(patch, EMBEDDINGS, states, layout)[:2])
    text, image_states = states[:, : layout.border], states[:, layout.border :]
    del states
    layouts, texts, images = [layout], [], []
    for layer in (None, *meter.layers):
        if layer is not None:
            text, image_states, layout = layer(text, image_states, layout)
            layouts.append(layout)
        if output_hidden_states:
            full_length = joint.expand(layout, trimmed, text, image_states)
            texts.append(full_length[0])
            images.append(full_length[1])
    # For `report`, `kept` and the budget loss.
    patch.record_lengths(layouts)
    patch.entry, patch.kept = entry, layout.places(trimmed, given_text)
    patch.record_decisions(layout.keep_ratios, layout.heads)
    text, image_states, layout = joint.unpack(layout, text, image_states)
    # Without any image token, zeros are pooled.
    first = (
        image_states
        if image_states.shape[1]
        else image_states.new_zeros(len(image_states), 1, image_states.shape[2])
    )
    pooler_output = torch.cat([meter.text_pooler(text), meter.image_pooler(first)], dim=-1)
    if not pooled:
        text, image_states = joint.expand(layout, trimmed, text, image_states)
    return MeterModelOutput(
        text_states=text,
        image_states=image_states,
        pooler_output=pooler_output,
        text_hidden_states=tuple(texts) if output_hidden_states else None,
        image_hidden_states=tuple(images) if output_hidden_states else None,
    )
