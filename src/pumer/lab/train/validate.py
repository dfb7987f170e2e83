"""Check which settings of a training can be combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pumer._extras import need
from pumer._files import is_empty
from pumer._options import check_values
from pumer._settings import check_settings
from pumer.adapters import find
from pumer.lab.tasks.base import Task
from pumer.lab.tasks.labels import check_fit, same_names
from pumer.lab.tasks.prompts import is_generative, vocabulary
from pumer.lab.train.arguments import trainer_settings
from pumer.lab.train.build import Models
from pumer.lab.train.recipe import check_recipe
from pumer.lab.train.settings import TrainSettings
from pumer.reducers import EMBEDDINGS, Reducer


def validate(settings: TrainSettings) -> tuple[TrainSettings, dict[str, Any]]:
    """The settings, converted to the types of their fields, and those of TrainingArguments.

    Raises:
        ValueError: for settings of the wrong type or that do not go together, for an output that is
            not empty, and on `resume` for settings that the training did not begin with.
    """
    settings = replace(settings, **check_settings(TrainSettings, vars(settings), "train"))
    check_values(TrainSettings, vars(settings))
    output = Path(settings.output)
    if not is_empty(output) and not settings.resume:
        raise ValueError(
            f"{output} is not empty: give another --output, or --resume true to resume "
            "from its last checkpoint"
        )
    trainer = trainer_settings(settings.trainer or {}, settings.early_stopping is not None)
    _check_evaluation(trainer, settings.eval_split, settings.early_stopping)
    if settings.resume:
        check_recipe(output, settings.recipe())
    return settings, trainer


def validate_models(settings: TrainSettings, trainer: Mapping[str, Any], models: Models) -> None:
    """Raise ValueError for settings that do not go with the models, and for missing packages."""
    student, task = models.student, models.task
    if settings.dense:
        _check_dense_targets(settings, models)
    _check_optimizer(settings, models)
    _check_learned_reducer(models.reducer, trainer)
    if trainer.get("label_smoothing_factor"):
        raise ValueError(
            "the losses do not support smoothed labels: leave trainer.label_smoothing_factor out"
        )
    if trainer.get("dataloader_persistent_workers") and (
        settings.augment or task.loss_kind == "rank"
    ):
        raise ValueError(
            "persistent workers would repeat the first epoch's images and texts in every epoch: "
            "leave trainer.dataloader_persistent_workers out"
        )
    if models.teacher is not None and settings.distill:
        _check_teacher(student, task, models.teacher)
        reason = uncached(student, task, settings.augment, settings.dense)
        if settings.distill.cache and reason:
            raise ValueError(f"{reason}: leave distill.cache out")
    if "tensorboard" in (trainer.get("report_to") or ()):
        need("trainer.report_to: tensorboard", "train", "tensorboard")


def _check_dense_targets(settings: TrainSettings, models: Models) -> None:
    layers = range(EMBEDDINGS, find(models.student).depth(models.student))
    if any(map(models.reducer.reduces_at, layers)):
        raise ValueError("dense targets need every patch: train them without a reducer")
    for name in ("augment", "blind", "optimizer"):
        if getattr(settings, name):
            raise ValueError(f"`{name}` and `grounding` cannot be combined: leave one of them out")


def _check_optimizer(settings: TrainSettings, models: Models) -> None:
    if settings.optimizer and models.reducer.traits.learned:
        raise ValueError("`optimizer` cannot be combined with a learned reducer: leave one out")
    if settings.optimizer and is_generative(models.student):
        raise ValueError(
            f"`optimizer` does not support {type(models.student).__name__}: leave it out"
        )


def _check_learned_reducer(reducer: Reducer, trainer: Mapping[str, Any]) -> None:
    if not reducer.traits.learned:
        return
    if reducer.traits.learned.self_distils and trainer.get("gradient_checkpointing"):
        raise ValueError(
            f"{reducer.name} distils from itself, which does not work with gradient checkpointing: "
            "leave trainer.gradient_checkpointing out"
        )
    if (trainer.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing loses the gradients of a learned reducer: leave "
            "trainer.gradient_checkpointing_kwargs.use_reentrant out"
        )


METRICS = ("accuracy", "loss")
"""Metrics of an evaluation during training."""


def _check_evaluation(
    trainer: Mapping[str, Any], eval_split: str | None, early_stopping: object
) -> None:
    """Raise ValueError for evaluation settings that cannot be met."""
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


def _check_teacher(net: PreTrainedModel, task: Task, teacher: PreTrainedModel) -> None:
    """Raise ValueError for a teacher with other outputs than the student."""
    if is_generative(net) != is_generative(teacher):
        raise ValueError(
            f"a {type(teacher).__name__} cannot teach a {type(net).__name__}: use two generative "
            "models, or two that classify"
        )
    if is_generative(net):
        return
    check_fit(teacher, task)
    names = vocabulary(teacher)
    if task.loss_kind != "rank" and not same_names(names, task.labels):
        others = ", others" if len(names) == len(task.labels) else ""
        raise ValueError(
            f"the teacher has {len(names)} answers, the student {len(task.labels)}{others}: distil "
            "from a model that was trained for the same answers"
        )


def uncached(
    student: PreTrainedModel, task: Task, augment: object, grounding: object
) -> str | None:
    """Why a teacher's logits cannot be cached; None if they can, see `DistillSettings.cache`."""
    if augment:
        return "augment changes the images, and the teacher's logits, in every epoch"
    if task.loss_kind == "rank":
        return f"{task.name} samples new texts in every epoch"
    if is_generative(student):
        return f"a {type(student).__name__} is distilled token by token"
    return "`grounding` and `distill.cache` cannot be combined" if grounding else None
