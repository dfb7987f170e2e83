"""METER's heads: question answering, several images, entailment, retrieval, masked words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.utils import ModelOutput

from pumer.models.heads import classifier, name_entailment_labels
from pumer.models.meter.configuration import MeterConfig
from pumer.models.meter.modeling import MeterModel, MeterPreTrainedModel


@dataclass
class MeterRetrievalOutput(ModelOutput):
    """Image-text matching scores.

    Args:
        logits: [B,1], for ranking.
        itm_logits: [B,2], no (0) or yes (1).
        hidden_states: [B,T+I,D] each, before the first fusion layer and after every layer, if
            requested.
    """

    logits: Tensor | None = None
    itm_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MeterForQuestionAnswering(MeterPreTrainedModel):
    """METER with a classifier over answers."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = classifier(config, 2 * config.hidden_size)
        self.post_init()

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Logits [B,A], and the loss if `labels` [B,A], scores of the answers, are given.

        The loss is the mean binary cross-entropy times the number of answers, as that of
        transformers' ViLT. Other inputs are those of `MeterModel`.
        """
        output = self.meter(**inputs)
        logits = self.classifier(output.pooler_output)
        loss = None
        if labels is not None:
            loss = functional.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.joint_hidden_states
        )


class MeterForVisualEntailment(MeterPreTrainedModel):
    """METER with the labels contradiction, neutral and entailment, unless `config.id2label` has
    others."""

    def __init__(self, config: MeterConfig) -> None:
        name_entailment_labels(config)
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = classifier(config, 2 * config.hidden_size)
        self.post_init()

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Logits [B,3], and the cross-entropy if `labels` int64 [B] are given; other inputs as for
        `MeterModel`."""
        output = self.meter(**inputs)
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.joint_hidden_states
        )


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """METER with a classifier over a sentence and several images, each in a separate pass
    (NLVR2)."""

    def __init__(self, config: MeterConfig) -> None:
        if config.modality_type_vocab_size <= config.num_images:
            raise ValueError(
                f"{config.num_images} images need modality_type_vocab_size "
                f"{config.num_images + 1}, not {config.modality_type_vocab_size}"
            )
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = classifier(config, 2 * config.hidden_size * config.num_images)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B,L], and the cross-entropy if `labels` int64 [B] are given.

        `pixel_values` is [B,images,3,H,W]; other inputs are those of `MeterModel`. Hidden states
        are not returned.
        """
        if (
            pixel_values is None
            or pixel_values.ndim != 5
            or pixel_values.shape[1] != self.config.num_images
        ):
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(
                f"pixel_values is [batch, {self.config.num_images}, 3, height, width], not {shape}"
            )
        text, mask = self.meter.encode_text(
            input_ids, attention_mask, token_type_ids, inputs_embeds
        )
        image = self.meter.encode_image(pixel_values.flatten(0, 1), pixel_mask)
        pooled: list[Any] = [
            self.meter.fuse(text, mask, each, image_token_type_idx=type_index).pooler_output
            for type_index, each in enumerate(_per_image(image, self.config.num_images), 1)
        ]
        logits = self.classifier(torch.cat(pooled, dim=-1))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _per_image(image: Any, count: int) -> list[Any]:
    """States of the first images of all examples, of the second ones, and so on."""
    return [image[image_index::count] for image_index in range(count)]


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """METER with a score for ranking, and a head for image-text matching."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.itm_score = nn.Linear(2 * config.hidden_size, 2)
        self.post_init()

    def forward(self, **inputs: Any) -> MeterRetrievalOutput:
        """Scores of pairs; inputs are those of `MeterModel`."""
        output = self.meter(**inputs)
        scores = self.score(output.pooler_output)
        scores.hidden_states = output.joint_hidden_states
        return scores

    def score(self, pooled: Tensor) -> MeterRetrievalOutput:
        """Scores from the pooled states [B,2D] of pairs."""
        return MeterRetrievalOutput(
            logits=self.rank_output(pooled), itm_logits=self.itm_score(pooled)
        )


class MeterForMaskedLM(MeterPreTrainedModel):
    """METER with a masked-language-modelling head."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.decoder = new_embeddings

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> MaskedLMOutput:
        """Logits [B,T,V], and the cross-entropy if `labels` int64 [B,T] are given, -100 where none
        is asked for.

        Other inputs are those of `MeterModel`.
        """
        output = self.meter(**inputs)
        logits = self.decoder(self.transform(output.text_states))
        loss = (
            None
            if labels is None
            else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.joint_hidden_states)
