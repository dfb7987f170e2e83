"""The forward of a reduced BridgeTower.

Bridges add the towers' states to those of the cross-modal layers, token by token. Tokens that left
there, or were merged, leave or are merged in what later bridges add; the towers keep all of theirs.

Shape suffixes: B batch, T text tokens, I image tokens, N = T + I, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import can_return_tuple

from pumer.adapters.base import Patch
from pumer.adapters.encoder import bridgetower_tower as tower
from pumer.adapters.encoder import co_attention, joint
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.clip import Encoded
from pumer.adapters.encoder.joint import TextInputs
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import exactly_one, max_length
from pumer.reducers import EMBEDDINGS


def patch_trunk(bridge: Any, patch: Patch, pooled: bool) -> None:
    """Change a `BridgeTowerModel` so that the reducer acts.

    Args:
        bridge: the model.
        patch: of it.
        pooled: whether only the pooled output is used.
    """
    patch.replace(bridge, "forward", _forward, patch, pooled)
    for layer_index, layer in enumerate(bridge.cross_modal_text_layers):
        patch.replace(layer, "forward", co_attention.run_text, patch, layer_index)
    for layer_index, layer in enumerate(bridge.cross_modal_image_layers):
        patch.replace(layer, "forward", co_attention.run_image, patch, layer_index)
    for layer_index, block in enumerate(bridge.vision_model.visual.transformer.resblocks):
        patch.wrap(block, "forward", tower.run_layer, patch, layer_index)


@dataclass
class _Towers:
    """Both towers between two of their layers.

    Args:
        text_BTD, image_BID: their states.
        mask_BT: of the text, as long as it is.
        bias_B11T: the same, added to attention scores.
        layout: of the image; its plan is the tower's reduction.
        lengths: image tokens before the first layer and after every layer.
        texts, images: all states so far, in the original length, if asked for.
    """

    text_BTD: Tensor
    image_BID: Tensor
    mask_BT: Tensor
    bias_B11T: Tensor
    layout: EncoderLayout
    lengths: list[int]
    texts: list[Tensor] | None
    images: list[Tensor] | None

    def note(self) -> None:
        """Keep the states, as the stock model returns them: tokens of the image come first."""
        if self.texts is not None and self.images is not None:
            self.texts.append(self.text_BTD)
            self.images.append(self.layout.expand(self.image_BID).transpose(0, 1))

    def run(self, text_layer: Any, block: Any) -> None:
        """Run a layer of each."""
        self.text_BTD = text_layer(self.text_BTD, self.bias_B11T)
        self.image_BID, self.layout = block(self.image_BID, self.layout)
        self.lengths.append(self.image_BID.shape[1])
        self.note()


@dataclass
class _Cross:
    """The cross-modal stream between two of its layers, with what `report` shows of it."""

    text_BTD: Tensor
    image_BID: Tensor
    layout: EncoderLayout
    lengths: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@can_return_tuple
def _forward(
    bridge: Any,
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
    labels: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    **kwargs: Any,
) -> Any:
    """Replaces `BridgeTowerModel.forward`.

    Hidden states come in their original length, zeros for tokens that were dropped; where only the
    pooled output is used, they are returned if asked for. There are no attention maps.
    """
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerModelOutput

    if input_ids is None:
        raise ValueError("give input_ids: BridgeTower takes no inputs_embeds")
    if kwargs.get("output_attentions") or bridge.config.output_attentions:
        raise ValueError(
            "a reduced BridgeTower returns no attention maps: leave output_attentions out"
        )
    hidden = kwargs.get("output_hidden_states")
    hidden = bridge.config.output_hidden_states if hidden is None else hidden
    towers = _embed(
        bridge,
        patch,
        TextInputs(input_ids, attention_mask),
        pixel_values,
        image_embeds,
        interpolate_pos_encoding,
        trim=pooled,
        hidden=hidden or not pooled,
    )
    given_text, trimmed = input_ids.shape[1], towers.text_BTD.shape[1]
    text_type, image_type = (
        bridge.token_type_embeddings(torch.full((1,), index, device=input_ids.device))
        for index in (0, image_token_type_idx or 1)
    )
    text_layers = bridge.text_model.encoder.layer
    blocks = bridge.vision_model.visual.transformer.resblocks
    first = len(text_layers) - len(bridge.cross_modal_text_layers) + 1
    cross: _Cross | None = None
    for depth in range(len(text_layers) + 1):
        if depth:
            towers.run(text_layers[depth - 1], blocks[depth - 1])
        if depth < first:
            continue
        if cross is None:
            cross = _enter(bridge, patch, towers, text_type, image_type)
        else:
            _bridge(bridge, depth - first, towers, cross, text_type, image_type)
        _run_cross(bridge, patch, depth - first, cross)
        if towers.texts is not None:
            cross.states.append(
                joint.expand(cross.layout, trimmed, cross.text_BTD, cross.image_BID)
            )
    assert cross is not None
    # For `report`, `kept` and the budget loss.
    patch.tower, patch.lengths = towers.lengths[: first + 1], cross.lengths
    patch.entry = (trimmed, towers.lengths[0], towers.layout.grid)
    patch.kept = cross.layout.places(trimmed, given_text)
    patch.record_decisions(cross.layout.keep_ratios, cross.layout.heads)
    text, image = cross.text_BTD, cross.image_BID
    # Without any image token, zeros are pooled.
    has_image = image if image.shape[1] else image.new_zeros(len(image), 1, image.shape[2])
    pooler_output = bridge.get_cls_features(text, has_image)
    if not pooled:
        text, image = joint.expand(cross.layout, trimmed, text, image)
    states = None
    if towers.texts is not None and towers.images is not None:
        states = (tuple(towers.texts), tuple(towers.images), tuple(cross.states))
    return BridgeTowerModelOutput(
        text_features=text, image_features=image, pooler_output=pooler_output, hidden_states=states
    )


def _embed(
    bridge: Any,
    patch: Patch,
    text: TextInputs,
    pixel_values: Tensor | None,
    image_embeds: Tensor | None,
    interpolate: bool,
    trim: bool,
    hidden: bool,
) -> _Towers:
    """The towers before their first layers; with `trim`, texts are cut to the longest."""
    vision = bridge.vision_model
    pixels = exactly_one(pixel_values=pixel_values, image_embeds=image_embeds)
    if len(pixels) != len(text.tokens):
        raise ValueError(
            f"{len(text.tokens)} texts and {len(pixels)} images: the batch sizes must agree"
        )
    mask_BT, grid = text.mask, None
    official = patch.traits.official  # the published code counts padded text
    if patch.trim and trim and not official and not torch.compiler.is_compiling():
        length = int(max_length(mask_BT))
        text, mask_BT = text.trimmed(length), mask_BT[:, :length]
    if image_embeds is None:
        size = vision.config.patch_size
        grid = pixels.shape[-2] // size, pixels.shape[-1] // size
        # The stock method puts tokens before samples.
        image_embeds = vision.visual.forward_pre(
            pixels.type(vision.dtype), interpolate_pos_encoding=interpolate
        ).transpose(0, 1)
    text_BTD = bridge.text_model.embeddings(input_ids=text.input_ids)
    hidden_B11T = ~mask_BT.bool()[:, None, None]
    bias = torch.zeros(hidden_B11T.shape, dtype=text_BTD.dtype, device=text_BTD.device)
    bias = bias.masked_fill(hidden_B11T, torch.finfo(text_BTD.dtype).min)
    towers = _Towers(
        text_BTD,
        image_embeds,
        mask_BT,
        bias,
        tower.entry_layout(image_embeds, grid),
        [image_embeds.shape[1]],
        [] if hidden else None,
        [] if hidden else None,
    )
    towers.note()
    return towers


def _enter(
    bridge: Any, patch: Patch, towers: _Towers, text_type: Tensor, image_type: Tensor
) -> _Cross:
    """What the first cross-modal layer gets, after reducers that act before it."""
    text = bridge._apply_text_transform(towers.text_BTD, layer_idx=0)
    image = bridge._apply_image_transform(_normed(bridge, towers.image_BID), layer_idx=0)
    text = bridge.cross_modal_text_layernorm(text + text_type)
    image = bridge.cross_modal_image_layernorm(image + image_type)
    sizes = None if towers.layout.plan is None else towers.layout.sizes_BN
    encoded = Encoded(image, sizes, towers.layout.plan, towers.layout.grid)
    layout = joint.entry_layout(patch, towers.mask_BT, encoded)
    states = torch.cat([text, image], dim=1)
    states, layout, _ = encoder.reduce(patch, EMBEDDINGS, states, layout)
    return _Cross(*joint.split(states, layout), layout, [layout.lengths])


def _bridge(
    bridge: Any,
    layer_index: int,
    towers: _Towers,
    cross: _Cross,
    text_type: Tensor,
    image_type: Tensor,
) -> None:
    """Add the towers' states, reduced as those of the cross-modal layers are."""
    text, image, plan = towers.text_BTD, _normed(bridge, towers.image_BID), cross.layout.plan
    if plan is not None:
        # Later layers may be on another device than the towers.
        text, image = (states.to(plan.slot_BN.device) for states in (text, image))
        source_text = text.shape[1]
        text = plan.head(source_text, cross.layout.text).reduce(text)
        # The plan starts from the tokens that the tower started with.
        image = plan.tail(source_text, cross.layout.text).reduce(
            towers.layout.to(image.device).expand(image)
        )
    text = bridge._apply_text_transform(text, layer_index)
    image = bridge._apply_image_transform(image, layer_index)
    text, image = text + text_type.to(text.device), image + image_type.to(image.device)
    text_link = bridge.cross_modal_text_link_tower[layer_index - 1]
    image_link = bridge.cross_modal_image_link_tower[layer_index - 1]
    cross.text_BTD = text_link(text, cross.text_BTD, None)
    cross.image_BID = image_link(image, cross.image_BID, None)


def _run_cross(bridge: Any, patch: Patch, layer_index: int, cross: _Cross) -> None:
    """Run a cross-modal layer of both streams; the image attends to the text before the layer."""
    text, image, layout, old_text = bridge.cross_modal_text_layers[layer_index](
        cross.text_BTD, cross.image_BID, cross.layout
    )
    image, layout = bridge.cross_modal_image_layers[layer_index](image, old_text, layout)
    cross.text_BTD, cross.image_BID, cross.layout = co_attention.reduce_after(
        patch, layer_index, text, image, layout
    )
    cross.lengths.append(cross.layout.lengths)


def _normed(bridge: Any, image_BID: Tensor) -> Tensor:
    """What the bridges read of the image tower."""
    normed: Tensor = bridge.vision_model.visual.ln_post(image_BID)
    return normed
