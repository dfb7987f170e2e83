"""A start for new, small METERs where no CLIP and no RoBERTa of their size exist."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def start_from_vilt(model: PreTrainedModel, vilt: PreTrainedModel) -> PreTrainedModel:
    """Copy a trained ViLT's word embeddings, and its first blocks into the vision tower, of a new METER model.

    A ViLT block and a CLIP layer are the same but for the activation: give the tower that of the ViLT.

    Raises ValueError if widths, patches or vocabularies differ, or the tower has more layers than the ViLT.
    """
    source, vision, text = vilt.base_model, model.base_model.vision_model, model.base_model.text_model
    table = source.embeddings.position_embeddings[0]
    old, new = vilt.config, model.config.vision_config
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size", "hidden_act")
    different = [name for name in same if getattr(old, name) != getattr(new, name)]
    if old.vocab_size != model.config.vocab_size:
        different.append("vocab_size")
    if different or len(vision.encoder.layers) > len(source.encoder.layer):
        raise ValueError(
            f"the vision tower cannot start from this ViLT: {', '.join(different) or 'num_hidden_layers'} differ"
        )
    projection = source.embeddings.patch_embeddings.projection
    kind = source.embeddings.token_type_embeddings.weight[1]
    vision.embeddings.patch_embedding.weight.copy_(projection.weight)
    vision.embeddings.class_embedding.copy_(source.embeddings.cls_token[0, 0] + kind)
    vision.embeddings.position_embedding.weight.copy_(table)
    vision.embeddings.position_embedding.weight[1:] += projection.bias + kind
    # ViLT has no norm there. One that scales by the usual spread changes least.
    side = new.image_size // new.patch_size
    plain = torch.rand(8, new.num_channels, side, side).repeat_interleave(new.patch_size, 2)
    embedded = vision.embeddings(2 * plain.repeat_interleave(new.patch_size, 3) - 1)
    vision.pre_layrnorm.weight.fill_(embedded.std(-1).mean())
    for layer, block in zip(vision.encoder.layers, source.encoder.layer, strict=False):
        attention = block.attention.attention
        for ours, theirs in (
            (layer.self_attn.q_proj, attention.query),
            (layer.self_attn.k_proj, attention.key),
            (layer.self_attn.v_proj, attention.value),
            (layer.self_attn.out_proj, block.attention.output.dense),
            (layer.mlp.fc1, block.intermediate.dense),
            (layer.mlp.fc2, block.output.dense),
            (layer.layer_norm1, block.layernorm_before),
            (layer.layer_norm2, block.layernorm_after),
        ):
            ours.load_state_dict(theirs.state_dict())
    words, embeddings = source.embeddings.text_embeddings, text.embeddings
    embeddings.word_embeddings.weight.copy_(words.word_embeddings.weight)
    embeddings.LayerNorm.load_state_dict(words.LayerNorm.state_dict())
    first = text.config.pad_token_id + 1  # RoBERTa counts positions from there
    count = min(len(words.position_embeddings.weight), len(embeddings.position_embeddings.weight) - first)
    embeddings.position_embeddings.weight[first : first + count] = words.position_embeddings.weight[:count]
    embeddings.token_type_embeddings.weight[0] = words.token_type_embeddings.weight[0]
    return model
