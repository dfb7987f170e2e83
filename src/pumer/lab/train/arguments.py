"""transformers' TrainingArguments, from the settings of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pumer._settings import check_settings
from pumer._suggest import did_you_mean
from pumer.lab.train.precision import in_bfloat16

_LOG = logging.getLogger(__name__)
_BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "restore_callback_states_from_checkpoint": True,
}
"""Defaults of early stopping, which a recipe may override."""

_OURS = {"output_dir", "seed", "remove_unused_columns", "label_names"}
"""Settings of TrainingArguments that `train` sets itself."""
_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "save_total_limit"),
)
_LEAST = dict.fromkeys(_COUNTS, 1) | dict.fromkeys(
    (
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "num_train_epochs",
        "dataloader_num_workers",
        "max_grad_norm",
    ),
    0,
)


def trainer_settings(trainer: Mapping[str, Any], early_stopping: bool) -> dict[str, Any]:
    """Settings checked against TrainingArguments; raises ValueError for unknown ones and wrong
    types."""
    # YAML parses the Trainer's strategy "no" as false.
    settings = {
        name: "no" if name.endswith("_strategy") and x is False else x
        for name, x in trainer.items()
    }
    if early_stopping:
        often = settings.setdefault("eval_strategy", "epoch")
        settings = {**_BEST, "save_strategy": often, **settings}  # of every evaluated model
        if "eval_steps" in settings:
            settings.setdefault("save_steps", settings["eval_steps"])
    setting_names = {field.name for field in fields(TrainingArguments) if field.init} - _OURS
    if ours := sorted(_OURS & set(settings)):
        raise ValueError(f"trainer.{ours[0]} is set by train itself: leave it out")
    if unknown := [name for name in settings if name not in setting_names]:
        hint = did_you_mean(unknown[0], setting_names)
        raise ValueError(
            f"trainer has no setting {', '.join(unknown)}.{hint} It takes those of transformers' "
            "TrainingArguments"
        )
    checked = check_settings(TrainingArguments, settings, "trainer")
    for name, least in _LEAST.items():
        value = checked.get(name)
        if isinstance(value, int | float) and value < least and (name, value) != ("max_steps", -1):
            raise ValueError(f"trainer: {name} is {value}; give {least} or more")
    return checked


def trainer_arguments(
    output: Path, seed: int, trainer: Mapping[str, Any], learned: bool
) -> TrainingArguments:
    """Build the Trainer's arguments.

    Args:
        output: the training's folder.
        seed: of the training.
        trainer: from `trainer_settings`.
        learned: whether the reducer has trainable parts.

    Raises:
        ValueError: for arguments that transformers rejects.
    """
    settings: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), **trainer}
    if learned:  # every parameter is used in every step
        settings.setdefault("ddp_find_unused_parameters", False)
    if settings.get("bf16") and not in_bfloat16(settings):
        _LOG.warning(
            "this processor has no bfloat16 arithmetic, and would be far slower with it: training "
            "in float32"
        )
        settings["bf16"] = False
    return TrainingArguments(
        output_dir=str(output),
        seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        **settings,
    )
