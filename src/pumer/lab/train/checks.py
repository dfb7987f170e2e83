"""Which settings of a training do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pumer.adapters import find
from pumer.lab.tasks.base import Task
from pumer.lab.tasks.labels import check_fit, same_names
from pumer.lab.tasks.prompts import vocabulary, writes
from pumer.reducers import EMBEDDINGS, Reducer


def check(
    net: PreTrainedModel,
    task: Task,
    reducer: Reducer,
    trainer: Mapping[str, Any],
    *,
    augment: object,
    dense: object,
    blind: object,
    optimizer: object,
) -> None:
    """Raise ValueError for settings of `train` that do not fit each other."""
    learned = reducer.traits.learned
    if dense and any(
        reducer.reduces_at(layer) for layer in range(EMBEDDINGS, find(net).depth(net))
    ):
        raise ValueError("dense targets need every patch: train them without a reducer")
    if dense and augment:
        raise ValueError(
            "dense targets say what is where in the picture as it is: train them without augment"
        )
    if dense and blind:
        raise ValueError("dense targets tell of the picture and of the question: leave blind out")
    if dense and optimizer:
        raise ValueError(
            "the published optimizer knows no head for dense targets: leave one of the two out"
        )
    if learned and optimizer:
        raise ValueError(
            "the published optimizer knows no learned reducer: leave one of the two out"
        )
    if learned and learned.self_distils and trainer.get("gradient_checkpointing"):
        raise ValueError(
            f"{reducer.name} is its own teacher, which a layer that is run again knows nothing of: "
            "leave trainer.gradient_checkpointing out"
        )
    if learned and (trainer.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise ValueError(
            "a layer that is run again by the reentrant way has no gradient for what decides in "
            "it: leave trainer.gradient_checkpointing_kwargs.use_reentrant out"
        )
    if optimizer and writes(net):
        raise ValueError(f"the published optimizer knows no {type(net).__name__}: leave it out")
    if trainer.get("label_smoothing_factor"):
        raise ValueError(
            "the losses here know no smoothed labels: leave trainer.label_smoothing_factor out"
        )
    if trainer.get("dataloader_persistent_workers") and (augment or task.loss_kind == "rank"):
        raise ValueError(
            "workers that stay from epoch to epoch would show the same pictures and texts in all "
            "of them: leave trainer.dataloader_persistent_workers out"
        )


METRICS = ("accuracy", "loss")
"""What an evaluation during training gives."""


def check_evaluation(
    trainer: Mapping[str, Any], eval_split: str | None, early_stopping: object
) -> None:
    """Raise ValueError for settings on evaluation during training that cannot be met."""
    metric = trainer.get("metric_for_best_model")
    if metric is not None and str(metric).removeprefix("eval_") not in METRICS:
        raise ValueError(
            f"trainer.metric_for_best_model is {metric!r}: give {' or '.join(METRICS)}"
        )
    asked = [
        name for name in ("load_best_model_at_end", "metric_for_best_model") if trainer.get(name)
    ]
    asked = [
        *(f"trainer.{name}" for name in asked),
        *(["early_stopping"] if early_stopping else []),
    ]
    if asked and eval_split is None:
        raise ValueError(
            f"{asked[0]} needs evaluations, which eval_split null leaves out: give eval_split"
        )


def check_teacher(net: PreTrainedModel, task: Task, teacher: PreTrainedModel) -> None:
    """Raise ValueError for a teacher that does not answer what the student is asked."""
    if writes(net) != writes(teacher):
        raise ValueError(
            f"a {type(teacher).__name__} cannot teach a {type(net).__name__}: take a model of one "
            "kind"
        )
    if writes(net):
        return
    check_fit(teacher, task)
    names = vocabulary(teacher)
    if task.loss_kind != "rank" and not same_names(names, task.labels):
        others = ", others" if len(names) == len(task.labels) else ""
        raise ValueError(
            f"the teacher has {len(names)} answers, the student {len(task.labels)}{others}: distil "
            "from a model that was trained for the same answers"
        )


def uncached(net: nn.Module, task: Task, augment: object, dense: object) -> str | None:
    """Why a teacher's logits cannot be kept, None if they can; see `DistillSettings.cache`."""
    if augment:
        return "augment changes the pictures, and what the teacher says of them, in every epoch"
    if task.loss_kind == "rank":
        return f"{task.name} draws its texts anew in every epoch"
    if writes(net):
        return f"a {type(net).__name__} is taught token by token"
    return "dense targets are for a model's own training" if dense else None
