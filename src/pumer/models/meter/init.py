"""Initialization of new, small METER models from a ViLT."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pumer.models.vilt.init import init_tower_from_vilt


@torch.no_grad()
def init_meter_from_vilt(model: PreTrainedModel, vilt: PreTrainedModel) -> PreTrainedModel:
    """Initialize a new METER model's word embeddings and vision tower from a trained ViLT.

    Raises ValueError if vocabularies differ; for the tower see `init_tower_from_vilt`.
    """
    init_text_from_vilt(model.base_model.text_model, vilt)
    init_tower_from_vilt(model.base_model.vision_model, vilt)
    return model


@torch.no_grad()
def init_text_from_vilt(text: PreTrainedModel, vilt: PreTrainedModel) -> None:
    """Initialize the embeddings of a new RoBERTa from a trained ViLT; raises ValueError if
    vocabularies differ."""
    if vilt.config.vocab_size != text.config.vocab_size:
        raise ValueError("the text encoder cannot start from this ViLT: vocab_size differ")
    words, embeddings = vilt.base_model.embeddings.text_embeddings, text.embeddings
    embeddings.word_embeddings.weight.copy_(words.word_embeddings.weight)
    embeddings.LayerNorm.load_state_dict(words.LayerNorm.state_dict())
    first = text.config.pad_token_id + 1  # RoBERTa counts positions from there
    count = min(
        len(words.position_embeddings.weight), len(embeddings.position_embeddings.weight) - first
    )
    embeddings.position_embeddings.weight[first : first + count] = words.position_embeddings.weight[
        :count
    ]
    embeddings.token_type_embeddings.weight[0] = words.token_type_embeddings.weight[0]
