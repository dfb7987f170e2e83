"""METER: RoBERTa and a CLIP vision tower, fused by co-attention layers.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers", CVPR 2022.
The towers and the parts of the fusion layers are from transformers.

Shape suffixes: B batch, T text tokens, I image tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertOutput,
    BertPooler,
)
from transformers.utils import ModelOutput

from pumer.models.meter.configuration import MeterConfig


@dataclass
class MeterModelOutput(ModelOutput):
    """The output of `MeterModel`.

    Args:
        text_states: [B,T,D] after the last fusion layer.
        image_states: [B,I,D], with [CLS] first.
        pooler_output: [B,2D], the pooled [CLS] of the text and of the image.
        text_hidden_states: of the text, before the first fusion layer and after every layer, if
            requested.
        image_hidden_states: of the image, likewise.
    """

    text_states: Tensor | None = None
    image_states: Tensor | None = None
    pooler_output: Tensor | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None
    image_hidden_states: tuple[Tensor, ...] | None = None

    @property
    def joint_hidden_states(self) -> tuple[Tensor, ...] | None:
        """[B,T+I,D] each, text first: the `hidden_states` of the heads."""
        if self.text_hidden_states is None or self.image_hidden_states is None:
            return None
        pairs = zip(self.text_hidden_states, self.image_hidden_states, strict=True)
        return tuple(torch.cat(pair, dim=1) for pair in pairs)


class MeterCrossLayer(nn.Module):
    """One half of a fusion layer: self-attention, cross-attention, feed-forward, all post-norm."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self, states: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None
    ) -> Tensor:
        """States [B,N,D] after attention to themselves and to `other` [B,M,D]."""
        states = self.attention(states, mask)[0]
        states = self.crossattention(states, None, other, other_mask)[0]
        return self.output(self.intermediate(states), states)


class MeterFusionLayer(GradientCheckpointingLayer):
    """Co-attention of text and image, in the order of `MeterConfig.update`."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.text = MeterCrossLayer(config)
        self.image = MeterCrossLayer(config)
        self.sequential = config.update == "sequential"

    def forward(
        self,
        text_BTD: Tensor,
        image_BID: Tensor,
        text_mask: Tensor | None,
        cross_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image states after the layer; the masks hide padded text from text and
        image."""
        new_text = self.text(text_BTD, image_BID, text_mask, None)
        text = new_text if self.sequential else text_BTD
        return new_text, self.image(image_BID, text, None, cross_mask)


class MeterPreTrainedModel(PreTrainedModel):
    """Base class of all METER models."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["MeterFusionLayer", "CLIPEncoderLayer", "RobertaLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True


class MeterModel(MeterPreTrainedModel):
    """METER without a head.

    The forward has three parts, so that scoring many pairs runs each tower once per text and per
    image: `encode_text`, `encode_image`, `fuse`.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.text_model = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.image_projection = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.modality_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [MeterFusionLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.text_pooler = BertPooler(config)
        self.image_pooler = BertPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_token_type_idx: int = 1,
        texts_per_image: int = 1,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MeterModelOutput:
        """States and pooled states of text and image.

        Args:
            input_ids: int64 [B,T].
            attention_mask: [B,T], 1 at real tokens; default: all.
            token_type_ids: [B,T]; RoBERTa has one type, 0.
            pixel_values: [B,3,H,W], or [B/K,3,H,W] with `texts_per_image` K. All images have one
                size; position embeddings are resized to it.
            pixel_mask: [B,H,W], all ones: METER does not support padded images.
            inputs_embeds: [B,T,D] instead of `input_ids`.
            image_token_type_idx: 1, or 2 for the second image of a pair.
            texts_per_image: number of consecutive texts per image.
            output_hidden_states: also return the states of all fusion layers.

        Raises:
            ValueError: if the batch sizes do not agree.
        """
        text, mask = self.encode_text(input_ids, attention_mask, token_type_ids, inputs_embeds)
        image = self.encode_image(pixel_values, pixel_mask)
        return self.fuse(
            text, mask, image, image_token_type_idx, texts_per_image, output_hidden_states
        )

    def encode_text(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Projected states of the text [B,T,D], and its mask [B,T]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        text_input = input_ids if input_ids is not None else inputs_embeds
        assert text_input is not None
        if attention_mask is None:
            attention_mask = torch.ones(
                text_input.shape[:2], dtype=torch.long, device=text_input.device
            )
        states = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        ).last_hidden_state
        return self.text_projection(states), attention_mask

    def encode_image(self, pixel_values: Tensor | None, pixel_mask: Tensor | None = None) -> Tensor:
        """Projected states of the image [B,I,D], [CLS] first."""
        check_images(pixel_values, pixel_mask)
        states = self.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        # CLIP applies this norm to [CLS] only; METER to every token.
        return self.image_projection(self.vision_model.post_layernorm(states))

    def fuse(
        self,
        text_BTD: Tensor,
        mask_BT: Tensor,
        image_BID: Tensor,
        image_token_type_idx: int = 1,
        texts_per_image: int = 1,
        output_hidden_states: bool | None = None,
    ) -> MeterModelOutput:
        """The fusion layers and poolers, on the outputs of the encoders; other arguments as in
        `forward`."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        image_BID = repeat_images(image_BID, text_BTD, texts_per_image)
        text = add_modality(self, text_BTD, 0)
        image = add_modality(self, image_BID, image_token_type_idx)
        text_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=text, attention_mask=mask_BT
        )
        cross_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=image,
            attention_mask=mask_BT,
            encoder_hidden_states=text,
        )
        texts, images = [text], [image]
        for layer in self.layers:
            text, image = layer(text, image, text_mask, cross_mask)
            texts.append(text)
            images.append(image)
        return MeterModelOutput(
            text_states=text,
            image_states=image,
            pooler_output=torch.cat([self.text_pooler(text), self.image_pooler(image)], dim=-1),
            text_hidden_states=tuple(texts) if output_hidden_states else None,
            image_hidden_states=tuple(images) if output_hidden_states else None,
        )


def add_modality(meter: MeterModel, states_BND: Tensor, modality: int) -> Tensor:
    """Add the embedding of a modality to states: 0 for text, from 1 for images."""
    # Call the module instead of reading its weight, which offload hooks load only for a call.
    return states_BND + meter.modality_embeddings(
        torch.full((1,), modality, device=states_BND.device)
    )


def check_images(pixel_values: Tensor | None, pixel_mask: Tensor | None) -> None:
    """Raise ValueError without images, and RuntimeError for padded ones, without a host-device
    sync."""
    if pixel_values is None:
        raise ValueError("give pixel_values: METER needs an image")
    if pixel_mask is not None:
        torch._assert_async(
            pixel_mask.bool().all(),
            "METER takes images of one size: use an image transform that makes them square",
        )


def repeat_images(image_BID: Any, text_BTD: Tensor, texts_per_image: int) -> Any:
    """Image states with one row per text; raises ValueError if the batch sizes do not fit."""
    if len(text_BTD) != len(image_BID) * texts_per_image:
        each = f" and texts_per_image {texts_per_image}" if texts_per_image != 1 else ""
        raise ValueError(
            f"{len(text_BTD)} texts and {len(image_BID)} images{each}: the batch sizes must agree"
        )
    if texts_per_image == 1:
        return image_BID
    return image_BID[torch.arange(len(text_BTD), device=text_BTD.device) // texts_per_image]
