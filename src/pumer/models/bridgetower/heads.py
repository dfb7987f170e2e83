"""BridgeTower's heads that transformers lacks: question answering, entailment, several images.

Xu et al., "BridgeTower: Building Bridges Between Encoders in Vision-Language Representation
Learning", AAAI 2023. Ranking has a stock class, `BridgeTowerForImageAndTextRetrieval`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BridgeTowerConfig, BridgeTowerModel, BridgeTowerPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from pumer.models.heads import classifier, name_entailment_labels

_ANY_SIZE = {"interpolate_pos_encoding": True}
"""Position embeddings are resized to images of another size than the configured one."""


class BridgeTowerForQuestionAnswering(BridgeTowerPreTrainedModel):
    """BridgeTower with a classifier over answers."""

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__(config)
        self.bridgetower = BridgeTowerModel(config)
        self.classifier = classifier(config, 2 * config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Logits [B,A], and the loss if `labels` [B,A], scores of the answers, are given.

        The loss is the mean binary cross-entropy times the number of answers, as that of
        transformers' ViLT. Other inputs are those of `BridgeTowerModel`.
        """
        output = self.bridgetower(**_ANY_SIZE | inputs)
        logits = self.classifier(output.pooler_output)
        loss = None
        if labels is not None:
            loss = functional.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=_joint_states(self.config, inputs, output)
        )


class BridgeTowerForVisualEntailment(BridgeTowerPreTrainedModel):
    """BridgeTower with the labels contradiction, neutral and entailment, unless `config.id2label`
    has others."""

    def __init__(self, config: BridgeTowerConfig) -> None:
        name_entailment_labels(config)
        super().__init__(config)
        self.bridgetower = BridgeTowerModel(config)
        self.classifier = classifier(config, 2 * config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(self, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Logits [B,3], and the cross-entropy if `labels` int64 [B] are given; other inputs as for
        `BridgeTowerModel`."""
        output = self.bridgetower(**_ANY_SIZE | inputs)
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=_joint_states(self.config, inputs, output)
        )


class BridgeTowerForImagesAndTextClassification(BridgeTowerPreTrainedModel):
    """BridgeTower with a classifier over a sentence and `config.num_images` images, each in a
    separate pass (NLVR2). Every image has its own token type."""

    def __init__(self, config: BridgeTowerConfig) -> None:
        if getattr(config, "num_images", 0) < 1:
            raise ValueError("give the configuration num_images, 2 for a pair")
        super().__init__(config)
        self.bridgetower = BridgeTowerModel(config)
        self.bridgetower.token_type_embeddings = nn.Embedding(
            config.num_images + 1, config.hidden_size
        )
        self.classifier = classifier(config, 2 * config.hidden_size * config.num_images)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B,L], and the cross-entropy if `labels` int64 [B] are given.

        `pixel_values` is [B,images,3,H,W]; other inputs are those of `BridgeTowerModel`. Hidden
        states are not returned.
        """
        count = self.config.num_images
        if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != count:
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(f"pixel_values is [batch, {count}, 3, height, width], not {shape}")
        pooled = [
            self.bridgetower(
                **_ANY_SIZE | inputs,
                pixel_values=pixel_values[:, index],
                image_token_type_idx=index + 1,
            ).pooler_output
            for index in range(count)
        ]
        logits = self.classifier(torch.cat(pooled, dim=-1))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _joint_states(config: Any, inputs: dict[str, Any], output: Any) -> tuple[Tensor, ...] | None:
    """[B,T+I,D] after every cross-modal layer, text first, if asked for."""
    if not inputs.get("output_hidden_states", config.output_hidden_states):
        return None
    return tuple(torch.cat(pair, dim=1) for pair in output.hidden_states[2])
