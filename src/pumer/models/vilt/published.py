"""ViLT checkpoints in the layout of the published PuMer code (csarron/PuMer): names of weights, and settings.

The published names are also those of the original ViLT, with `vilt.` in front of all but the heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.vilt.configuration_vilt import ViltConfig

from pumer.models.vilt.entailment import LABELS
from pumer.reducers import PuMer

CLASSES = {
    "vqa_classifier": "ViltForQuestionAnswering",
    "nlvr2_classifier": "ViltForImagesAndTextClassification",
    "ve_classifier": "ViltForVisualEntailment",
    "rank_output": "ViltForImageAndTextRetrieval",
    "mlm_score": "ViltForMaskedLM",
}
"""The head's name in a published checkpoint, and the class that has its place."""
POSITION_IDS = "vilt.text_embeddings.position_ids"

_BLOCK = "vilt.transformer.blocks."
_LAYER = "vilt.encoder.layer."
_MODULES = {
    "vilt.text_embeddings.": "vilt.embeddings.text_embeddings.",
    "vilt.token_type_embeddings.": "vilt.embeddings.token_type_embeddings.",
    "vilt.transformer.cls_token": "vilt.embeddings.cls_token",
    "vilt.transformer.pos_embed": "vilt.embeddings.position_embeddings",
    "vilt.transformer.patch_embed.proj.": "vilt.embeddings.patch_embeddings.projection.",
    "vilt.transformer.norm.": "vilt.layernorm.",
    "mlm_score.bias": "mlm_score.decoder.bias",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = [f"attention.attention.{name}" for name in ("query", "key", "value")]

# What the published configuration has besides: of training, or fixed by the shapes of the weights.
_WITHOUT_EFFECT = [
    "vqa_label_size",
    "max_text_len",
    "tokenizer",
    "vocab_size",
    "whole_word_masking",
    "mlm_prob",
    "draw_false_text",
    "token_types",
    "keep_ratio",
    "merge_ratio",
    "distill",
    "contrast_method",
    "ib_kl",
    "vit",
    "hidden_size",
    "num_layers",
    "mlp_ratio",
    "prune_method",
    "freeze_patterns",
    "itm_loss",
    "mlm_loss",
    "mpp_loss",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "patch_size",
]
_SCORES = {"mh": "mean_head", "fh": "first_head", "km": "k_metric"}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; those it has no place for (`itm_score`) keep their own.

    Args:
        state: weights under the published names, of any task.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(rf"{re.escape(_BLOCK)}(\d+)\.(.+)\.(weight|bias)", name)
        if name == POSITION_IDS:
            continue
        if block is None:
            renamed[_rename(name, _MODULES | {f"{head}.": "classifier." for head in _classifiers()})] = tensor
        elif block[2] == "attn.qkv":
            for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{_LAYER}{block[1]}.{part}.{block[3]}"] = rows
        else:
            renamed[f"{_LAYER}{block[1]}.{_IN_BLOCK.get(block[2], block[2])}.{block[3]}"] = tensor
    return renamed


def from_transformers(state: Mapping[str, Tensor], head: str | None = None) -> dict[str, Tensor]:
    """The opposite of `to_transformers`.

    Args:
        state: weights under transformers' names, all of them.
        head: published name of the module that transformers calls `classifier`, for the classes that have one.

    Raises:
        ValueError: if there is a classifier, and `head` does not name it.
    """
    back = {new: old for old, new in _MODULES.items()}
    if any(name.startswith("classifier.") for name in state):
        if head not in _classifiers():
            raise ValueError(f"head says what the classifier is, one of {', '.join(_classifiers())}, not {head!r}")
        back["classifier."] = f"{head}."
    in_block = {new: old for old, new in _IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(rf"{re.escape(_LAYER)}(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            renamed[_rename(name, back)] = tensor
        elif layer[2] == _QKV[0]:
            parts = [state[f"{_LAYER}{layer[1]}.{part}.{layer[3]}"] for part in _QKV]
            renamed[f"{_BLOCK}{layer[1]}.attn.qkv.{layer[3]}"] = torch.cat(parts)
        elif layer[2] not in _QKV:
            renamed[f"{_BLOCK}{layer[1]}.{in_block.get(layer[2], layer[2])}.{layer[3]}"] = tensor
    positions = renamed.get("vilt.text_embeddings.position_embeddings.weight")
    if positions is not None:
        renamed[POSITION_IDS] = torch.arange(len(positions), device=positions.device)[None]
    return renamed


def find_head(state: Mapping[str, Tensor]) -> str:
    """The published name of a checkpoint's head, a key of `CLASSES`; raises ValueError if there is none."""
    for head in CLASSES:
        if any(name.startswith(f"{head}.") for name in state):
            return head
    raise ValueError(f"the weights have no head that is known: {', '.join(CLASSES)}")


def check_support(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a checkpoint with learned pruning."""
    if settings.get("prune_layers") or any("token_pruner." in name for name in state):
        raise ValueError(
            "the checkpoint prunes by learned predictors (prune_layers, token_pruner), which load_official does not "
            "support yet: use one that was trained without them"
        )


def unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Names in a published config.json that mean nothing to us."""
    reducing = (
        "prune_layers",
        "reduce_layers",
        "merge_text",
        *(name for pair in _ALIASES.values() for name in pair),
    )
    known = {"num_heads", "drop_rate", "pos_grid", *reducing, *_WITHOUT_EFFECT, *ViltConfig().to_dict()}
    return sorted(set(settings) - known)


def model_config(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViltConfig:
    """The transformers configuration of a published checkpoint.

    Sizes are read off the weights. The number of heads and the grid of positions do not show there: they are taken
    from `num_heads` (12) and `pos_grid` ([12, 12]).

    Args:
        settings: config.json.
        state: weights under the published names.

    Raises:
        ValueError: for weights without the sizes, and for settings that transformers' ViLT cannot have.
    """
    vocabulary, width = _shape(state, "vilt.text_embeddings.word_embeddings.weight", 2)
    patch = _shape(state, "vilt.transformer.patch_embed.proj.weight", 4)
    blocks = [int(name.removeprefix(_BLOCK).split(".")[0]) for name in state if name.startswith(_BLOCK)]
    heads = settings.get("num_heads", 12)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"num_heads in config.json is a divisor of the width {width}, not {heads!r}")
    grid = settings.get("pos_grid", [12, 12])
    if not isinstance(grid, list) or len(grid) != 2 or grid[0] != grid[1] or not isinstance(grid[0], int):
        raise ValueError(f"pos_grid in config.json is two equal numbers, for example [12, 12], not {grid!r}")
    depth = settings.get("num_layers", 0)
    if not isinstance(depth, int):
        raise ValueError(f"num_layers in config.json is a whole number, not {depth!r}")
    if patch[2] != patch[3]:
        raise ValueError(f"transformers' ViLT has square patches, the weights have {patch[2]} x {patch[3]} pixels")
    config = ViltConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        # A checkpoint that lacks whole layers must not pass for a shallower one.
        num_hidden_layers=max([depth, *(number + 1 for number in blocks)]),
        num_attention_heads=heads,
        intermediate_size=_shape(state, f"{_BLOCK}0.mlp.fc1.weight", 2)[0],
        max_position_embeddings=_shape(state, "vilt.text_embeddings.position_embeddings.weight", 2)[0],
        type_vocab_size=_shape(state, "vilt.text_embeddings.token_type_embeddings.weight", 2)[0],
        modality_type_vocab_size=_shape(state, "vilt.token_type_embeddings.weight", 2)[0],
        num_channels=patch[1],
        patch_size=patch[2],
        image_size=grid[0] * patch[2],
    )
    _set_labels(config, find_head(state), state, width)
    return config


def reducer(settings: Mapping[str, Any]) -> PuMer:
    """The token reduction that a published config.json asks for, `official=True`.

    Raises:
        ValueError: for settings that contradict each other or do not exist.
    """
    prune = _number(settings, "prune_r", 0)
    merge = _number(settings, "merge_r", 0)
    merge_text = _number(settings, "merge_text", 0)
    layers = settings.get("reduce_layers")
    joint = prune == 0 and merge >= 1  # a count; without layers, in all of them
    if layers is None and prune > 0:
        raise ValueError("config.json has prune_r but no reduce_layers: name them, for example [2, 5, 8]")
    if not (prune or merge or merge_text) or not (layers or (layers is None and joint)):
        return PuMer(official=True, prune=0, merge=0, merge_text=0, layers=())
    if layers is not None and not isinstance(layers, list):
        raise ValueError(f"reduce_layers in config.json is a list of numbers, for example [2, 5, 8], not {layers!r}")
    score = _setting(settings, "sim_method", "mean_head")
    return PuMer(
        official=True,
        prune=prune,
        merge=merge,
        merge_text=merge_text,
        layers=None if layers is None else tuple(layers),
        score=_SCORES.get(score, score),
        style=_setting(settings, "merge_style", "tome"),
    )


_ALIASES = {
    "prune_r": ("prune_r", "prune"),
    "merge_r": ("merge_r", "merge_image"),
    "merge_text": ("merge_text",),
    "sim_method": ("sim_method", "score"),
    "merge_style": ("merge_style", "style"),
}


def _setting(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    given = {alias: settings[alias] for alias in _ALIASES[name] if settings.get(alias) is not None}
    if len(set(map(str, given.values()))) > 1:
        raise ValueError(f"{' and '.join(_ALIASES[name])} in config.json contradict each other: {given}")
    return next(iter(given.values()), default)


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = _setting(settings, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} in config.json is a number, not {value!r}")
    return value


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in state or state[name].ndim != dimensions:
        found = f"has shape {list(state[name].shape)}" if name in state else "is missing"
        raise ValueError(f"{name} {found}: these are not the weights of a published ViLT")
    return state[name].shape


def _set_labels(config: ViltConfig, head: str, state: Mapping[str, Tensor], width: int) -> None:
    if head not in _classifiers():
        return
    config.num_labels = _shape(state, f"{head}.3.weight", 2)[0]
    if head == "nlvr2_classifier":
        config.num_images = _shape(state, f"{head}.0.weight", 2)[1] // width
    names = {"ve_classifier": LABELS, "nlvr2_classifier": ("False", "True")}.get(head, ())
    if len(names) == config.num_labels:
        set_label_names(config, names)


def set_label_names(config: ViltConfig, names: list[str] | tuple[str, ...]) -> None:
    """Give the classes their names, in order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _classifiers() -> list[str]:
    return [head for head in CLASSES if head.endswith("_classifier")]


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
