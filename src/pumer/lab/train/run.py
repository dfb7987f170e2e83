"""One training run: validate the settings, build the models, prepare the data, fit, save."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

import pumer
from pumer._files import check_space, fingerprint, locked, new_folder, replacing
from pumer.adapters.base import OPTIONS
from pumer.hub import save
from pumer.lab.data.text import save_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.tasks.base import Collator, Task
from pumer.lab.tasks.processors import save_processor
from pumer.lab.tasks.prompts import PromptCollator, collator_for
from pumer.lab.train.arguments import trainer_arguments
from pumer.lab.train.build import Models, build, optimizer_groups
from pumer.lab.train.checkpoints import check_last_checkpoint, usable_checkpoints
from pumer.lab.train.examples import Epochs, Examples, count_without_target
from pumer.lab.train.generative_trainer import GenerativeTrainer
from pumer.lab.train.grounding import Grounded
from pumer.lab.train.model import model_path
from pumer.lab.train.recipe import write_recipe
from pumer.lab.train.settings import TrainSettings
from pumer.lab.train.teacher import (
    TeachingCollator,
    cached_teacher_logits,
    same_inputs,
    teachers_collator,
)
from pumer.lab.train.trainer import Distillation, TaskTrainer
from pumer.lab.train.validate import validate, validate_models
from pumer.lab.train.watch import Bar, ReadableLog, StopAtNaN

_WAIT = 10.0  # seconds: the workers of a killed run end within them, and hold its folder until then
_SPACE = 16  # bytes per weight: in the model, and in a checkpoint with two states of the optimizer


def train(settings: TrainSettings) -> dict[str, float]:
    """Fine-tune a model on a task with its reducer applied, and write it to `settings.output`.

    Returns:
        The metrics of the last evaluation, accuracy in percent. Where several processes train,
        their process group ends with the training.

    Raises:
        ValueError: for settings of the wrong type or that do not go together, for data that the
            model cannot learn from, and on `resume` for settings other than those the training
            began with; nothing is written then. For a loss or weights that are not finite, as soon
            as they occur.
    """
    settings, trainer = validate(settings)
    set_seed(settings.seed)
    models = build(settings)
    validate_models(settings, trainer, models)
    learned = models.reducer.traits.learned is not None
    arguments = trainer_arguments(Path(settings.output), settings.seed, trainer, learned)
    optimizer = optimizer_groups(settings, models, arguments)
    data = prepare_data(settings, models, arguments)
    runner = make_trainer(settings, models, data, arguments, optimizer)
    return fit(settings, models, runner)


@dataclass
class TrainingData:
    """Examples and the collator that makes batches of them.

    Args:
        examples: of the training split.
        evaluated: of the evaluation split, if there is one.
        collator: makes the student's batches, with the teacher's inputs where they differ.
        teacher_collator: makes the teacher's.
        without_target: training examples whose answers are not among the labels.
    """

    examples: Examples
    evaluated: Examples | None
    collator: Any
    teacher_collator: Collator | None
    without_target: int


# --- data ---


def prepare_data(
    settings: TrainSettings, models: Models, arguments: TrainingArguments
) -> TrainingData:
    """Read both splits and build the collators; computes the teacher's logits if they are cached.

    Raises:
        ValueError: for a split that the model cannot learn from, and for a teacher that cannot take
            the student's examples.
    """
    task = models.task
    collator: Any = replace(
        collator_for(models.student, task, models.tokenizer, models.transform, models.max_length),
        blind=settings.blind,
    )
    examples = Examples(task.examples(settings.train_split), settings.augment, settings.seed)
    without_target = count_without_target(examples.examples, task, settings.train_split)
    evaluated = Examples(task.examples(settings.eval_split)) if settings.eval_split else None
    teacher_collator = _prepare_teacher(settings, models, examples, collator, arguments)
    if isinstance(collator, PromptCollator):
        collator = replace(collator, teach=True)
    elif (
        teacher_collator is not None
        and examples.teacher_logits is None
        and not same_inputs(teacher_collator, collator)
    ):
        collator = TeachingCollator(collator, teacher_collator)
    return TrainingData(examples, evaluated, collator, teacher_collator, without_target)


def _prepare_teacher(
    settings: TrainSettings,
    models: Models,
    examples: Examples,
    collator: Collator,
    arguments: TrainingArguments,
) -> Collator | None:
    """The teacher's collator; with `distill.cache` its logits are attached to the examples."""
    distill = settings.distill
    if models.teacher is None or distill is None:
        return None
    teacher_path = str(distill.teacher)
    teacher_collator = teachers_collator(models.teacher, teacher_path, collator)
    if distill.cache:
        about = {
            "teacher": fingerprint(model_path(teacher_path)),
            "task": settings.task,
            "split": settings.train_split,
        }
        examples.teacher_logits = cached_teacher_logits(
            models.teacher, examples, teacher_collator, arguments, distill.cache, about
        )
    return teacher_collator


# --- fit ---


def make_trainer(
    settings: TrainSettings,
    models: Models,
    data: TrainingData,
    arguments: TrainingArguments,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
) -> TaskTrainer:
    """The Trainer with all of its callbacks."""
    distillation, dense = None, settings.dense
    if models.teacher is not None and (distill := settings.distill):
        distillation = Distillation(
            models.teacher, data.teacher_collator, distill.weight, distill.temperature
        )
    trainer_class = GenerativeTrainer if isinstance(data.collator, PromptCollator) else TaskTrainer
    runner = trainer_class(
        model=Grounded(models.student, dense.layer) if dense else models.student,
        args=arguments,
        data_collator=data.collator,
        train_dataset=data.examples,
        eval_dataset=data.evaluated,
        compute_metrics=trainer_class.metrics,
        task=models.task,
        distillation=distillation,
        grounding_weight=dense.weight if dense else 0.0,
        itm_weight=settings.itm_weight,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[Epochs(data.examples, models.task, settings.train_split)],
    )
    runner.add_callback(StopAtNaN(runner))
    if early := settings.early_stopping:
        runner.add_callback(EarlyStoppingCallback(early.patience, early.threshold))
    # Lines in place of the Trainer's dicts.
    runner.remove_callback(PrinterCallback)
    runner.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        runner.add_callback(Bar())
    summary = _summary(models.task, settings.train_split, data)
    runner.add_callback(ReadableLog(summary, Path(settings.output) / "model"))
    return runner


def _summary(task: Task, split: str, data: TrainingData) -> str:
    """Task, split and their figures in a line."""
    answers = f"{len(task.labels)} answers, " if task.loss_kind != "rank" and task.labels else ""
    return (
        f"{task.name} {split}: {len(data.examples)} examples, {answers}"
        f"{data.without_target} examples without a target"
    )


def fit(settings: TrainSettings, models: Models, runner: TaskTrainer) -> dict[str, float]:
    """Train, evaluate and save, with the output folder locked."""
    output = Path(settings.output)
    check_space(output, _SPACE * sum(weight.numel() for weight in models.student.parameters()))
    with locked(output, wait=_WAIT) if runner.args.process_index == 0 else nullcontext():
        resumable = _can_resume(settings, runner)
        if runner.is_world_process_zero():
            write_recipe(output, settings.recipe())
        runner.train(resume_from_checkpoint=resumable or None)
        metrics = runner.evaluate() if settings.eval_split else {}
        if runner.is_world_process_zero():
            save_run(output, models, runner.state.log_history)
            accuracy = (
                f", accuracy {metrics['eval_accuracy']:.2f} % on {settings.eval_split}"
                if metrics
                else ""
            )
            print(f"the model is in {output / 'model'}{accuracy}")
    # Threads of a process group that outlive the interpreter abort it: a training that went well
    # would end in an error.
    runner.accelerator.wait_for_everyone()
    runner.accelerator.end_training()
    return metrics


def _can_resume(settings: TrainSettings, runner: TaskTrainer) -> bool:
    """Whether `resume` was asked for and there is a checkpoint; raises ValueError for one that
    cannot be used, and for a run that has finished."""
    output = Path(settings.output)
    with runner.args.main_process_first():
        resumable = settings.resume and usable_checkpoints(output)
    if settings.resume and not resumable and (output / "model").exists():
        raise ValueError(
            f"{output} holds a finished model and no checkpoint to resume from: give another "
            "--output"
        )
    if resumable:
        check_last_checkpoint(output)
    return resumable


# --- save ---


def save_run(output: Path, models: Models, log_history: list[dict[str, Any]]) -> None:
    """Write the model's folder, then the log.

    The folder appears complete or not at all, and replaces that of an earlier stop of the same run.
    """
    student = models.student
    patch = pumer.active(student)
    if patch is not None and isinstance(patch.reducer, pumer.Unreduced):
        pumer.remove(student)
    elif patch is not None:
        # Trained with whichever kernel was fastest; saved with the fused one.
        settings = {name: getattr(patch, name) for name in OPTIONS if name != "attention"}
        pumer.apply(student, patch.reducer, **settings)
    with new_folder(output / "model", replace=True) as folder:
        save(student, folder)
        models.tokenizer.model_max_length = models.max_length
        save_tokenizer(models.tokenizer, folder)
        save_transform(models.transform, folder)
        save_processor(student.config, folder)
    # Last: a training that has its log is done.
    with replacing(output / "log.json") as file:
        file.write(json.dumps(log_history, indent=1) + "\n")
