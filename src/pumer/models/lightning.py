"""Checkpoints of the original ViLT and METER: their weights under the published PuMer names.

ViLT: Kim et al., ICML 2021 (dandelin/ViLT). METER: Dou et al., CVPR 2022 (zdou0830/METER).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_VILT = ("text_embeddings.", "token_type_embeddings.", "transformer.", "pooler.")
_METER = ("text_transformer.", "token_type_embeddings.", "cross_modal_", "vit_model.visual.")
_UNUSED = "text_transformer.pooler."
_SETTINGS = (
    "num_heads",
    "num_top_layer",
    "drop_rate",
    "pos_grid",
    "text_encoder",
    "image_encoder",
    "fusion",
)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an original checkpoint under the published names.

    Unused weights, of the text encoder's pooler and CLIP's text tower, keep their names.

    Raises:
        ValueError: if they are neither ViLT's nor METER's.
    """
    if any(name.startswith("cross_modal_text_layers.") for name in state):
        return {_of_meter(name): tensor for name, tensor in state.items()}
    if any(name.startswith("transformer.blocks.") for name in state):
        return {
            f"vilt.{name}" if name.startswith(_VILT) else name: tensor
            for name, tensor in state.items()
        }
    raise ValueError("the weights are neither the original ViLT's nor METER's")


def settings_of(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a PuMer checkpoint, from the hyperparameters of an original model."""
    settings = {name: made_with[name] for name in _SETTINGS if name in made_with}
    return {**settings, "official": False, "update": "parallel"}


def _of_meter(name: str) -> str:
    if name.startswith("snli_classifier."):
        return f"ve_classifier.{name.removeprefix('snli_classifier.')}"
    if not name.startswith(_METER) or name.startswith(_UNUSED):
        return name
    return f"meter.{name.replace('vit_model.visual.', 'vit_model.', 1)}"
