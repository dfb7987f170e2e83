"""Visual entailment with ViLT: does the image contradict a sentence, leave it open, or entail it?

transformers has no class for it. Xie et al., "Visual Entailment: A Novel Task for Fine-Grained
Image Understanding", 2019; the head is the one of the published PuMer checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.vilt.configuration_vilt import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltModel, ViltPreTrainedModel

from pumer.models.heads import classifier, name_entailment_labels


class ViltForVisualEntailment(ViltPreTrainedModel):
    """ViLT with a head of three classes on the pooled text [CLS].

    The classes are `heads.LABELS`, in that order unless `config.id2label` names them.
    """

    def __init__(self, config: ViltConfig) -> None:
        name_entailment_labels(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vilt = ViltModel(config)
        self.classifier = classifier(config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B,3], and the cross entropy if `labels` (int64 [B]) are given.

        The inputs are those of `ViltForQuestionAnswering`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.vilt(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.classifier(outputs[1])
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
        if not return_dict:
            return (*(() if loss is None else (loss,)), logits, *outputs[2:])
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
