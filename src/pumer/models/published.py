"""The config.json of checkpoints for the published PuMer code (csarron/PuMer): what its ViLT and
METER have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pumer.reducers import DynamicViT

TASKS = {
    "nlvr2_classifier": ("False", "True"),
    "ve_classifier": ("contradiction", "neutral", "entailment"),
}
"""Heads with fixed classes, in the published order."""
REDUCTION = {
    "prune_r": ("prune_r", "prune"),
    "merge_r": ("merge_r", "merge_image"),
    "merge_text": ("merge_text",),
    "sim_method": ("sim_method", "score"),
    "merge_style": ("merge_style", "style"),
}
"""Published settings of the reducer, with their aliases."""
OURS = ("official", "update")
"""Settings that only pumer writes: whether reducer and METER's fusion are those of the published
code."""

# Further published settings: of training, or implied by the shapes of the weights.
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
_PREDICTOR = re.compile(r"token_pruner\.token_predictors\.(\d+)\.(.+)")


def check_support(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a checkpoint with learned pruning by unsupported predictors."""
    method = settings.get("prune_method", "mlp_states")
    if settings.get("prune_layers") and method != "mlp_states":
        raise ValueError(
            f"the checkpoint prunes by {method!r} (prune_method in config.json), load_official "
            "supports mlp_states"
        )


def learned_pruning(
    settings: Mapping[str, Any], layer_of: Callable[[int], int]
) -> DynamicViT | None:
    """The learned pruning that a published config.json asks for, None without any.

    Args:
        settings: config.json.
        layer_of: maps a number in `prune_layers` to the layer.

    Raises:
        ValueError: for invalid settings.
    """
    numbers = settings.get("prune_layers")
    if not numbers:
        return None
    if not (isinstance(numbers, list) and all(isinstance(layer, int) for layer in numbers)):
        raise ValueError(
            "prune_layers in config.json is a list of numbers, for example [2, 4, 6], not "
            f"{numbers!r}"
        )
    keep = settings.get("keep_ratio", 1)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(f"keep_ratio in config.json is a number, not {keep!r}")
    return DynamicViT(keep=keep, layers=tuple(map(layer_of, numbers)), official=True)


def predictors(state: Mapping[str, Tensor], layer_of: Callable[[int], int]) -> dict[str, Tensor]:
    """The weights of learned pruning under the names of `DynamicViT.parts`."""
    tensors = {}
    for name, tensor in state.items():
        if match := _PREDICTOR.search(name):
            tensors[f"{layer_of(int(match[1]))}.layers.{match[2]}"] = tensor
    return tensors


def unknown_settings(settings: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Unknown names in a published config.json; `known` are those of one model."""
    reduction = [
        "prune_layers",
        "reduce_layers",
        *(name for names in REDUCTION.values() for name in names),
    ]
    return sorted(
        set(settings) - {"num_heads", "drop_rate", *OURS, *reduction, *_WITHOUT_EFFECT, *known}
    )


def reduction(settings: Mapping[str, Any]) -> tuple[float, float, float, list[int] | None]:
    """`prune_r`, `merge_r`, `merge_text` and `reduce_layers` of a config.json.

    Raises:
        ValueError: for settings that contradict each other or are not numbers.
    """
    prune, merge, merge_text = (
        number(settings, name, 0) for name in ("prune_r", "merge_r", "merge_text")
    )
    layers = settings.get("reduce_layers")
    if layers is None and prune > 0:
        raise ValueError(
            "config.json has prune_r but no reduce_layers: name them, for example [2, 5, 8]"
        )
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    ):
        raise ValueError(
            "reduce_layers in config.json is a list of numbers, for example [2, 5, 8], not "
            f"{layers!r}"
        )
    return prune, merge, merge_text, layers


def is_official(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is for the published code: all but those that pumer wrote of other
    models."""
    official = settings.get("official", True)
    if not isinstance(official, bool):
        raise ValueError(f"official in config.json is true or false, not {official!r}")
    return official


def setting(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting of the reducer under any alias; raises ValueError if these contradict each
    other."""
    values = {
        alias: settings[alias] for alias in REDUCTION[name] if settings.get(alias) is not None
    }
    if len(set(map(str, values.values()))) > 1:
        raise ValueError(
            f"{' and '.join(REDUCTION[name])} in config.json contradict each other: {values}"
        )
    return next(iter(values.values()), default)


def number(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A numeric setting of the reducer."""
    value = setting(settings, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} in config.json is a number, not {value!r}")
    return value


def whole(settings: Mapping[str, Any], name: str, default: int) -> int:
    """An integer setting."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} in config.json is a whole number, not {value!r}")
    return value


def heads(settings: Mapping[str, Any], name: str, default: int, width: int) -> int:
    """A number of attention heads, which the weights do not determine."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or width % value:
        raise ValueError(f"{name} in config.json is a divisor of the width {width}, not {value!r}")
    return value


def shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of a weight; raises ValueError if it is missing or has other dimensions."""
    if name not in state or state[name].ndim != dimensions:
        problem = f"has shape {list(state[name].shape)}" if name in state else "is missing"
        raise ValueError(
            f"{name} {problem}: these are not the weights of a published {name.split('.')[0]} "
            "checkpoint"
        )
    return state[name].shape


def depth(state: Mapping[str, Tensor], layers: str, least: int) -> int:
    """Number of layers, from weights named `layers` and a number.

    `least` is the number in config.json, so that a checkpoint with missing layers does not pass for
    a shallower one.
    """
    layer_indices = [
        int(name.removeprefix(layers).split(".")[0]) for name in state if name.startswith(layers)
    ]
    return max([least, *(layer + 1 for layer in layer_indices)])


def check_image_size(image_size: int, patch_size: int) -> None:
    """Raise ValueError if the image size in pixels is not a multiple of the patch size."""
    if image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} is no multiple of the patches' {patch_size} pixels"
        )


def set_labels(
    config: Any, head: str, state: Mapping[str, Tensor], pooled: int, answers: list[str] | None
) -> None:
    """Set the labels of a head, and the number of images, in a configuration.

    Args:
        config: changed in place.
        head: its published name.
        state: weights under the published names, without those of a new head.
        pooled: channels of the head's input per image.
        answers: of question answering, in order.

    Raises:
        ValueError: if the number of answers does not fit, or is unknown.
    """
    if not head.endswith("_classifier"):
        return
    names = answers if head == "vqa_classifier" else TASKS[head]
    new = f"{head}.3.weight" not in state
    if new and names is None:
        raise ValueError("a new head for question answering needs its answers: give them")
    count = len(names or ()) if new else shape(state, f"{head}.3.weight", 2)[0]
    config.num_labels = count
    if head == "nlvr2_classifier":
        config.num_images = 2 if new else shape(state, f"{head}.0.weight", 2)[1] // pooled
    if names is not None and len(names) != count and head == "vqa_classifier":
        raise ValueError(
            f"the vocabulary has {len(names)} answers, the weights {count}: give the one they "
            "belong to"
        )
    if names is not None and len(names) == count:
        set_label_names(config, names)


def set_label_names(config: PreTrainedConfig, names: list[str] | tuple[str, ...]) -> None:
    """Set the names of the labels, in order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def check_labels(config: PreTrainedConfig, head: str) -> None:
    """Raise ValueError if labels are not in the order of the published head."""
    names = TASKS.get(head)
    config_names = tuple(config.id2label[index] for index in sorted(config.id2label))
    if names is not None and sorted(config_names) == sorted(names) and config_names != names:
        raise ValueError(
            f"the published layout has the classes in the order {', '.join(names)}, not "
            f"{', '.join(config_names)}"
        )
