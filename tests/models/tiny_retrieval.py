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

import pumer

Adapt = Callable[[Inputs], Inputs]
Layout = Sequence[Sequence[int | str]]


@dataclass(frozen=True)
class Retriever:
    """A retriever of pages.

    Args:
        inside: family in `tiny_llm` of the model inside, or of one that is given the same inputs.
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


def modernvbert() -> nn.Module:
    """An encoder whose layers but one see a window."""
    sides = {name: tiny_llm.SIGLIP[name] for name in tiny_llm.SIDES}
    text = {name: x for name, x in tiny_llm.TEXT.items() if name != "num_key_value_heads"}
    config = transformers.ModernVBertConfig(
        vision_config=sides | {"model_type": "siglip_vision_model"},
        text_config=text
        | {"model_type": "modernbert", "local_attention": 16, "global_attn_every_n_layers": 2}
        | {"cls_token_id": 1, "sep_token_id": 1},
        image_token_id=tiny_llm.IMAGE,
        pixel_shuffle_factor=2,
    )
    return tiny_llm.with_large_weights(transformers.ModernVBertModel(config))


COLPALI = transformers.ColPaliForRetrieval, transformers.ColPaliConfig
COLQWEN2 = transformers.ColQwen2ForRetrieval, transformers.ColQwen2Config
COLMODERNVBERT = transformers.ColModernVBertForRetrieval, transformers.ColModernVBertConfig
RETRIEVERS = {
    "colpali": Retriever("paligemma", COLPALI, same),
    "colqwen2": Retriever("qwen2_vl", COLQWEN2, padded_images),
    "colmodernvbert": Retriever("smolvlm", COLMODERNVBERT, same),
    "colqwen2_5": Retriever("qwen2_5_vl", COLQWEN2, padded_images),
}


def model(name: str, attention: str = "sdpa") -> nn.Module:
    """A retriever in eval mode around the model that `tiny_llm` makes."""
    retriever = RETRIEVERS[name]
    inside = modernvbert() if name == "colmodernvbert" else tiny_llm.model(retriever.inside).model
    model_class, config_class = retriever.around
    config = config_class(vlm_config=inside.config.to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    made = model_class(config)
    made.vlm.load_state_dict(inside.state_dict())
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
        return pumer.vectors(model, **inputs)
