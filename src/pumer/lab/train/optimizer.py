"""The parameter groups of PuMer's published training: learning rates and weight decay.

Groups go by published parameter names, so ours are converted first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel, Trainer

from pumer._options import Weight
from pumer.adapters.base import PARTS
from pumer.models.meter.published import LAYOUT as METER
from pumer.models.vilt.published import LAYOUT as VILT

Part = Literal["trunk", "fusion", "head"]
_LAYOUTS = {"vilt": VILT, "meter": METER}


@dataclass
class OptimizerSettings:
    """Learning rates of parts of the model, as multiples of the trunk's.

    Args:
        head_lr_multiplier: of classifiers.
        fusion_lr_multiplier: of METER's fusion layers, with the projections before and the poolers
            after them.
    """

    head_lr_multiplier: Weight = 1.0
    fusion_lr_multiplier: Weight = 1.0


def group_of(name: str) -> tuple[Part, bool]:
    """The part of the model that a weight belongs to by its published name, and whether it decays.

    Biases and norms do not decay, except the norms whose names do not say so: a classifier's, and
    CLIP's `ln_*`. The heads of retrieval learn as the trunk does.
    """
    part: Part = "fusion" if "cross_modal" in name else "head" if "classifier" in name else "trunk"
    return part, not re.search("bias|[Nn]orm", name)


def parameter_groups(
    model: PreTrainedModel, settings: OptimizerSettings, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """All parameters in groups as torch's optimizers take them; raises ValueError as
    `published_names` does.

    Args:
        model: an unreduced or a reduced one of ours or of transformers'.
        settings: multiples of the learning rate.
        learning_rate: of the trunk.
        weight_decay: of what decays.
    """
    rates = {
        "trunk": 1.0,
        "fusion": settings.fusion_lr_multiplier,
        "head": settings.head_lr_multiplier,
    }
    names = published_names(model)
    groups: dict[tuple[Part, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part, decays = group_of(names[name])
        new = {
            "params": [],
            "lr": learning_rate * rates[part],
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.setdefault((part, decays), new)["params"].append(parameter)
    return list(groups.values())


def reducer_groups(
    model: PreTrainedModel, multiplier: float, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """All parameters in groups, those of a learned reducer with a learning rate of their own.

    Args:
        model: with its reducer active.
        multiplier: of the learning rate of the reducer's parts.
        learning_rate: of the rest.
        weight_decay: of what the Trainer lets decay: neither biases nor norms.
    """
    decaying = set(
        Trainer.get_decay_parameter_names(cast(Any, None), model)
    )  # which has no use for a Trainer
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        key = name.startswith(f"{PARTS}."), name in decaying
        rate = learning_rate * (multiplier if key[0] else 1.0)
        new = {"params": [], "lr": rate, "weight_decay": weight_decay if key[1] else 0.0}
        groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def published_names(model: PreTrainedModel) -> dict[str, str]:
    """The published name of every parameter, by its name in the model; queries, keys and values may
    share one.

    Raises ValueError for models that the published code has no place for.
    """
    layout = _LAYOUTS.get(model.config.model_type)
    if layout is None:
        raise ValueError(
            f"the published optimizer is for ViLT and METER, not for {model.config.model_type}"
        )
    names = [name for name, _ in model.named_parameters()]
    # Each weight is sent through the conversion as its number, which shows where it ends up.
    numbers = {name: torch.tensor([float(index)]) for index, name in enumerate(names)}
    published = layout.from_ours(numbers, layout.head_of(type(model).__name__))
    return {
        names[int(index)]: name
        for name, ended_up in published.items()
        if name != layout.position_ids  # which no weight turns into
        for index in ended_up.tolist()
    }
