"""New, small LLaVAs: a tokenizer for answers, and initialization from a ViLT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pumer.models.vilt.init import init_tower_from_vilt, plain_images

IMAGE = "<image>"
"""The placeholder of an image in a prompt."""


def writing_tokenizer(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Change an encoder's tokenizer, in place, into one of a decoder for visual question answering.

    A prompt is the image, the question and the separator, which also ends an answer. Answers that
    the tokenizer cannot represent get a token each.
    """
    lost = [
        text
        for text in answers
        if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text
    ]
    tokenizer.add_tokens([AddedToken(text, single_word=True) for text in lost])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE], "eos_token": tokenizer.sep_token}
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # `generate` takes no token types
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        f"{{{{ '{IMAGE}' if part.type == 'image' else part.text }}}}"
        f"{{% endfor %}}{tokenizer.sep_token}{{% endfor %}}"
    )
    return tokenizer


def new_llava(
    kind: Any,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    vilt: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A LLaVA with the vocabulary of its tokenizer.

    Args:
        kind: the model class.
        settings: of the configuration; those of the tokenizer are filled in.
        tokenizer: see `writing_tokenizer`.
        vilt: a ViLT of the same width, whose first blocks initialize the tower, and whose word
            embeddings the language model.

    Raises:
        ValueError: if the ViLT does not fit, see `init_tower_from_vilt`.
    """
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = settings.get("text_config", {}) | vocabulary
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    model = kind(kind.config_class(**settings | {"text_config": text, "image_token_id": image}))
    # LLaVA does not use this norm; a trainable weight without gradient breaks distributed training.
    model.base_model.vision_tower.post_layernorm.requires_grad_(False)
    return model if vilt is None else _start(model, vilt)


@torch.no_grad()
def _start(model: PreTrainedModel, vilt: PreTrainedModel) -> PreTrainedModel:
    trunk = model.base_model
    init_tower_from_vilt(trunk.vision_tower, vilt)
    words, table = (
        vilt.base_model.embeddings.text_embeddings,
        trunk.language_model.embed_tokens.weight,
    )
    # With the norm of ViLT's embeddings, which a decoder does not have.
    word_embeddings = words.LayerNorm(words.word_embeddings.weight)
    if word_embeddings.shape[1] != table.shape[1]:
        raise ValueError("the language model cannot start from this ViLT: hidden_size differ")
    table[: len(word_embeddings)] = word_embeddings[: len(table)]
    table[len(word_embeddings) :].normal_(std=float(word_embeddings.std()))
    # Scale image tokens to the norm of words, so that neither dominates.
    features = torch.cat(
        model.get_image_features(plain_images(model.config.vision_config)).pooler_output
    )
    trunk.multi_modal_projector.linear_2.weight *= word_embeddings.std() / features.std()
    return model
