"""Sizes of a joint encoder, wherever its configuration keeps them."""

from __future__ import annotations

from typing import Any


def vision_of(config: Any) -> Any:
    """What has the `image_size` and `patch_size` of a model."""
    return config if hasattr(config, "image_size") else config.vision_config


def text_of(config: Any) -> Any:
    """What has the `vocab_size` and `pad_token_id` of a model."""
    return config if hasattr(config, "vocab_size") else config.text_config


def longest_text(config: Any) -> int:
    """The longest text that a model reads, special tokens included."""
    if hasattr(config, "max_position_embeddings"):
        return int(config.max_position_embeddings)
    text = config.text_config  # as in RoBERTa, positions up to the padding token's are skipped
    return int(text.max_position_embeddings - text.pad_token_id - 1)
