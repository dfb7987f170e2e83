"""Tiny random-weight retrievers, and padded batches of pages for them.

Their prompts are those of the decoder inside, as `tiny_llm` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tiny_llm
import torch
import transformers
from tiny_parts import Inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Adapt = Callable[[Inputs], Inputs]
Layout = Sequence[Sequence[int | str]]


@dataclass(frozen=True)
class Retriever:
    """A retriever of pages.

    Args:
        inside: family of the model inside, in `tiny_llm`.
        around: the retriever's class, and that of its configuration.
        adapt: its inputs, from those of the model inside.
    """

    inside: str
    around: tuple[type, type]
    adapt: Adapt


def same(inputs: Inputs) -> Inputs:
    return dict(inputs)


def padded_images(inputs: Inputs) -> Inputs:
    """Every image a row of its own with padding behind it, and nothing that tells positions."""
    adapted = {name: x for name, x in inputs.items() if name != "mm_token_type_ids"}
    if "pixel_values" in inputs:
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        adapted["pixel_values"] = pad_sequence(inputs["pixel_values"].split(sizes), True)
    return adapted


COLPALI = transformers.ColPaliForRetrieval, transformers.ColPaliConfig
COLQWEN2 = transformers.ColQwen2ForRetrieval, transformers.ColQwen2Config
RETRIEVERS = {
    "colpali": Retriever("paligemma", COLPALI, same),
    "colqwen2": Retriever("qwen2_vl", COLQWEN2, padded_images),
    "colqwen2_5": Retriever("qwen2_5_vl", COLQWEN2, padded_images),
}


def model(name: str, attention: str = "sdpa") -> nn.Module:
    """A retriever in eval mode around the model that `tiny_llm` makes."""
    retriever = RETRIEVERS[name]
    inside = tiny_llm.model(retriever.inside)
    model_class, config_class = retriever.around
    config = config_class(vlm_config=inside.config.to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    made = model_class(config)
    made.vlm.load_state_dict(inside.model.state_dict())
    made.set_attn_implementation(attention)
    return made.eval()


def batch(name: str, layout: Layout, side: str = "right") -> Inputs:
    """As `tiny_llm.batch`."""
    retriever = RETRIEVERS[name]
    return retriever.adapt(tiny_llm.batch(retriever.inside, layout, side))


def alone(name: str, layout: Layout, row: int) -> Inputs:
    """As `tiny_llm.alone`."""
    retriever = RETRIEVERS[name]
    return retriever.adapt(tiny_llm.alone(retriever.inside, layout, row))


def vectors(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The vectors of every sample's real tokens."""
    with torch.no_grad():
        output = model(**inputs)
    mask = output.get("attention_mask")
    mask = inputs["attention_mask"] if mask is None else mask
    return [rows[real.bool()] for rows, real in zip(output.embeddings, mask, strict=True)]
