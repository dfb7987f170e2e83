"""The student and the teacher of a training, as its settings ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

import pumer
from pumer import presets
from pumer._shipped import model_folder
from pumer.adapters import find
from pumer.lab.data.transforms import build_transform, load_transform
from pumer.lab.tasks.base import Task
from pumer.lab.tasks.prompts import is_generative
from pumer.lab.train.model import longest_text, prepare, read_model, start_parts
from pumer.lab.train.optimizer import parameter_groups, reducer_groups
from pumer.lab.train.settings import TrainSettings
from pumer.lab.train.trainer import TaskTrainer
from pumer.reducers import Reducer


@dataclass
class Models:
    """What a training needs built before its data.

    Args:
        student: the model to train, its reducer applied.
        tokenizer: the student's.
        transform: the student's image transform.
        max_length: longest text in tokens.
        task: with the student's labels.
        reducer: applied to the student; `Unreduced` where the recipe names none.
        teacher: an unreduced model to distil from.
    """

    student: PreTrainedModel
    tokenizer: Any
    transform: Any
    max_length: int
    task: Task
    reducer: Reducer
    teacher: PreTrainedModel | None


def build(settings: TrainSettings) -> Models:
    """Load or create the student and the teacher, and apply the reducer."""
    student, tokenizer, task = prepare(settings.model, settings.task, settings.train_split)
    max_length = longest_text(student, settings.model.max_length)
    transform = (
        build_transform(settings.image)
        if settings.image
        else load_transform(model_folder(str(settings.model.path)))
    )
    reducer = (
        pumer.Unreduced() if settings.reducer is None else presets.read_reducer(settings.reducer)
    )
    _set_attention(student, settings.attention)
    pumer.apply(student, reducer, attention=settings.attention)
    start_parts(student, settings.model.path)
    teacher = None
    if settings.distill and settings.distill.teacher:
        teacher = read_model(settings.distill.teacher)
        _set_attention(teacher, settings.attention)
        pumer.apply(teacher, pumer.Unreduced(), attention=settings.attention)
    return Models(student, tokenizer, transform, max_length, task, reducer, teacher)


def _set_attention(model: PreTrainedModel, attention: str) -> None:
    """Set the kernel of vision towers and decoders, which the adapter leaves alone, where
    transformers has a choice."""
    has_choice = model._supports_sdpa or attention == "eager"
    if has_choice and (find(model).tower_depth(model) or is_generative(model)):
        model.set_attn_implementation(attention)


def optimizer_groups(
    settings: TrainSettings, models: Models, arguments: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer and its parameter groups, where they are not the Trainer's own."""
    if not (settings.optimizer or models.reducer.traits.learned):
        return None
    optimizer_class, options = TaskTrainer.get_optimizer_cls_and_kwargs(arguments, models.student)
    rates = arguments.learning_rate, arguments.weight_decay
    options["params"] = (
        parameter_groups(models.student, settings.optimizer, *rates)
        if settings.optimizer
        else reducer_groups(models.student, settings.reducer_lr_multiplier, *rates)
    )
    return optimizer_class, options
