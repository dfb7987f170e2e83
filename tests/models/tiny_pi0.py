"""A tiny random-weight PI0, and what its processor gives of cameras and orders."""

from __future__ import annotations

from collections.abc import Sequence

import tiny_llm
import torch
import transformers
from tiny_parts import IMAGE, PAD, SIGLIP, TEXT, Inputs
from torch import nn

TOKENS = 16
"""Of every image."""
CHUNK, WIDTH = 5, 4
"""Actions of a chunk, and numbers of an action."""


def model(attention: str = "sdpa") -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    vlm = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP, projection_dim=32),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    config = transformers.PI0Config(
        vlm_config=vlm,
        dit_config=transformers.GemmaConfig(**TEXT | {"hidden_size": 16}, head_dim=8),
        chunk_size=CHUNK,
        max_state_dim=WIDTH,
        max_action_dim=WIDTH,
        num_inference_steps=3,
    )
    made = transformers.PI0ForConditionalGeneration(config)
    tiny_llm.with_large_weights(made)
    made.set_attn_implementation(attention)
    return made.eval()


def batch(layout: Sequence[tuple[int, int]], seed: int = 3) -> Inputs:
    """A batch padded on the right.

    Args:
        layout: (cameras, words of the order) of every sample.
        seed: of all values.
    """
    rows = [sample(*counts, seed + row) for row, counts in enumerate(layout)]
    longest = max(len(row["input_ids"]) for row in rows)
    cameras = max(len(row["pixel_values"]) for row in rows)

    def padded(name: str, length: int, value: int = 0) -> torch.Tensor:
        return torch.stack(
            [
                torch.cat([x, x.new_full((length - len(x), *x.shape[1:]), value)])
                for x in (row[name] for row in rows)
            ]
        )

    return {
        "input_ids": padded("input_ids", longest, PAD),
        "attention_mask": padded("attention_mask", longest),
        "pixel_values": padded("pixel_values", cameras),
        "pixel_attention_mask": padded("pixel_attention_mask", cameras),
        "state": padded("state", WIDTH),
        "noise": padded("noise", CHUNK),
    }


def sample(cameras: int, words: int, seed: int) -> Inputs:
    """One sample, without a batch axis."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(2, 50, (words,), generator=generator).tolist()
    ids = [*[IMAGE] * TOKENS * cameras, 1, *order]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(cameras, 3, 32, 32, generator=generator),
        "pixel_attention_mask": torch.ones(cameras, dtype=torch.bool),
        "state": torch.randn(WIDTH, generator=generator),
        "noise": torch.randn(CHUNK, WIDTH, generator=generator),
    }
