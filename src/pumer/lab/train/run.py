"""One training run: a recipe in, a model folder out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

import pumer
from pumer import presets
from pumer._extras import need
from pumer._files import check_space, fingerprint, is_empty, locked, new_folder, replacing
from pumer._options import Count, OutputFolder, Positive, Weight, check_values
from pumer._settings import typed
from pumer._shipped import model_folder
from pumer.adapters import find
from pumer.hub import save
from pumer.lab.data.augment import RandAugment
from pumer.lab.data.text import save_tokenizer
from pumer.lab.data.transforms import build_transform, load_transform, save_transform
from pumer.lab.tasks.base import Blind, Task
from pumer.lab.tasks.processors import save_processor
from pumer.lab.tasks.prompts import PromptCollator, collator_for, writes
from pumer.lab.train.arguments import trainer_arguments, trainer_settings
from pumer.lab.train.checkpoints import check_last_checkpoint, usable_checkpoints
from pumer.lab.train.checks import check, check_evaluation, check_teacher, uncached
from pumer.lab.train.examples import Epochs, Examples, count_without_target
from pumer.lab.train.grounding import Grounded
from pumer.lab.train.model import (
    ModelSettings,
    longest_text,
    model_path,
    prepare,
    read_model,
    start_parts,
)
from pumer.lab.train.optimizer import OptimizerSettings, parameter_groups, reducer_groups
from pumer.lab.train.recipe import check_recipe, write_recipe
from pumer.lab.train.teacher import TeachingCollator, same_inputs, taught, teachers_collator
from pumer.lab.train.trainer import TaskTrainer
from pumer.lab.train.watch import Bar, ReadableLog, StopAtNaN
from pumer.lab.train.writing import WritingTrainer

_WAIT = 10.0  # seconds: a kill leaves workers that end within them, and keep the folder until then
_SPACE = 16  # bytes of a weight: in the model, and in a checkpoint with two states of the optimizer


@dataclass
class DistillSettings:
    """The teacher.

    Args:
        teacher: folder of the unreduced model to distil from; none if not given.
        weight: weight of the distillation loss, KL(teacher || student); the task's loss has weight
            1.
        temperature: softmax temperature of the distillation loss.
        cache: folder for the teacher's logits. They are then computed once, before training, and
            read in every epoch and by every other training that asks for the same; a file takes
            four bytes per example and answer. Delete it when the task's files change.
    """

    teacher: str | None = None
    weight: Weight = 1.0
    temperature: Positive = 1.0
    cache: str | None = None


@dataclass
class GroundingSettings:
    """Dense targets: what is under each patch, and whether the question means it.

    Args:
        weight: weight of that loss; the task's loss has weight 1; 0 leaves it out.
        layer: the layer after which it is asked for. Later layers are left to carry what it teaches
            to the answer.
    """

    weight: Weight = 0.0
    layer: int = 4


@dataclass
class EarlyStoppingSettings:
    """Stop where evaluations get no better, and keep the best model.

    Args:
        patience: evaluations in a row without progress, after which the training stops.
        threshold: what counts as progress, in percent of accuracy, or in loss where
            `trainer.metric_for_best_model` is "loss".
    """

    patience: Count = 3
    threshold: float = 0.0


@typed("train")
def train(
    output: OutputFolder,
    task: dict[str, Any],
    model: ModelSettings,
    reducer: str | dict[str, Any] | None = None,
    distill: DistillSettings | None = None,
    image: dict[str, Any] | None = None,
    augment: RandAugment | None = None,
    grounding: GroundingSettings | None = None,
    optimizer: OptimizerSettings | None = None,
    reducer_lr_multiplier: Weight = 10.0,
    itm_weight: Weight = 0.5,
    blind: Blind = None,
    train_split: str = "train",
    eval_split: str | None = "val",
    early_stopping: EarlyStoppingSettings | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    seed: int = 1,
    resume: bool = False,
    trainer: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Fine-tune a model on a task with its reducer on, and write it to `output`.

    Args:
        output: folder for checkpoints, logs and the finished model (`output`/model); new or empty
            unless `resume`.
        task: `name` and settings of the task: `root`, `images` and `skip` of those in files; of
            vqav2 also `labels`, the answers to choose from, and `answers`, `min_count` and
            `answer_splits` for a new list of them, which docs/training.md tells of.
        model: what is trained.
        reducer: a preset's name, or `reducer` and its settings; none trains the fused but unreduced
            model.
        distill: a teacher to distil from.
        image: image transform: `kind` (square, crop or keep_aspect) and its settings; the model's
            own if not given.
        augment: RandAugment on the images of the training.
        grounding: a loss on dense targets, for tasks that have them.
        optimizer: the published parameter groups; transformers' own if not given.
        reducer_lr_multiplier: learning rate of what a learned reducer trains, as a multiple of the
            model's.
        itm_weight: weight of the image-text matching loss in retrieval, for models with a head for
            it; ranking has 1.
        blind: show the model the text alone, or the image alone, as a baseline.
        train_split: split to train on.
        eval_split: split to evaluate on; none to leave it out.
        early_stopping: stop where evaluations get no better; after every epoch, if `trainer` says
            nothing else.
        attention: kernel to train with; on CPUs "eager" is the faster one for small models.
        seed: seed of new weights, order of examples and dropout.
        resume: go on from the last checkpoint in `output`.
        trainer: settings of transformers' TrainingArguments; `bf16` is for machines that have such
            arithmetic, on a CPU without it the training is in float32.

    Returns:
        The metrics of the last evaluation, accuracy in percent. Where several processes train,
        their group ends with the training.

    Raises:
        ValueError: for settings of the wrong type or that do not fit each other, for data that the
            model cannot learn from, and on `resume` for settings that the training did not begin
            with; nothing is written then. For a loss or weights that are not finite, when they come
            up.
    """
    recipe = {name: value for name, value in locals().items() if name not in ("output", "resume")}
    check_values(train, {"output": output, **recipe})
    out = Path(output)
    if not is_empty(out) and not resume:
        raise ValueError(
            f"{out} is not empty: give another --output, or --resume true to go on from its last "
            "checkpoint"
        )
    chosen = trainer_settings(trainer or {}, early_stopping is not None)
    check_evaluation(chosen, eval_split, early_stopping)
    if resume:
        check_recipe(out, recipe)
    set_seed(seed)
    net, tokenizer, the_task = prepare(model, task, train_split)
    max_length = longest_text(net, model.max_length)
    transform = build_transform(image) if image else load_transform(model_folder(str(model.path)))
    settings = pumer.Unreduced() if reducer is None else presets.read_reducer(reducer)
    _use(attention, net)
    pumer.apply(net, settings, attention=attention)
    start_parts(net, model.path)
    teacher = None
    if distill and distill.teacher:
        teacher = read_model(distill.teacher)
        _use(attention, teacher)
        pumer.apply(teacher, pumer.Unreduced(), attention=attention)
    dense = grounding if grounding and grounding.weight else None
    check(
        net,
        the_task,
        settings,
        chosen,
        augment=augment,
        dense=dense,
        blind=blind,
        optimizer=optimizer,
    )
    if teacher is not None and distill:
        check_teacher(net, the_task, teacher)
        if distill.cache and (reason := uncached(net, the_task, augment, dense)):
            raise ValueError(f"{reason}: leave distill.cache out")
    if "tensorboard" in (chosen.get("report_to") or ()):
        need("trainer.report_to: tensorboard", "train", "tensorboard")
    arguments = trainer_arguments(out, seed, chosen, learned=settings.traits.learned is not None)
    groups = None
    if optimizer or settings.traits.learned:
        optimizer_class, options = TaskTrainer.get_optimizer_cls_and_kwargs(arguments, net)
        rates = arguments.learning_rate, arguments.weight_decay
        options["params"] = (
            parameter_groups(net, optimizer, *rates)
            if optimizer
            else reducer_groups(net, reducer_lr_multiplier, *rates)
        )
        groups = (optimizer_class, options)
    collator: Any = replace(
        collator_for(net, the_task, tokenizer, transform, max_length), blind=blind
    )
    examples = Examples(the_task.examples(train_split), augment, seed)
    without = count_without_target(examples.examples, the_task, train_split)
    evaluated = Examples(the_task.examples(eval_split)) if eval_split else None
    teacher_collator = None
    if teacher is not None and distill:
        teacher_collator = teachers_collator(teacher, str(distill.teacher), collator)
        if distill.cache:
            about = {
                "teacher": fingerprint(model_path(str(distill.teacher))),
                "task": task,
                "split": train_split,
            }
            examples.taught = taught(
                teacher, examples, teacher_collator, arguments, distill.cache, about
            )
    kind_of_trainer = TaskTrainer
    if isinstance(collator, PromptCollator):
        collator, kind_of_trainer = replace(collator, teach=True), WritingTrainer
    elif (
        teacher_collator is not None
        and examples.taught is None
        and not same_inputs(teacher_collator, collator)
    ):
        collator = TeachingCollator(collator, teacher_collator)
    runner = kind_of_trainer(
        model=Grounded(net, dense.layer) if dense else net,
        args=arguments,
        data_collator=collator,
        train_dataset=examples,
        eval_dataset=evaluated,
        compute_metrics=kind_of_trainer.metrics,
        task=the_task,
        teacher=teacher,
        teacher_collator=teacher_collator,
        distill_weight=distill.weight if distill else 0.0,
        temperature=distill.temperature if distill else 1.0,
        grounding_weight=dense.weight if dense else 0.0,
        itm_weight=itm_weight,
        optimizer_cls_and_kwargs=groups,
        callbacks=[Epochs(examples, the_task, train_split)],
    )
    runner.add_callback(StopAtNaN(runner))
    if early_stopping:
        runner.add_callback(
            EarlyStoppingCallback(early_stopping.patience, early_stopping.threshold)
        )
    _talk(runner, _data(the_task, train_split, len(examples), without), out / "model")
    check_space(out, _SPACE * sum(weight.numel() for weight in net.parameters()))
    with locked(out, wait=_WAIT) if arguments.process_index == 0 else nullcontext():
        with arguments.main_process_first():
            resumable = resume and usable_checkpoints(out)
        if resume and not resumable and (out / "model").exists():
            raise ValueError(
                f"{out} holds a finished model and no checkpoint to go on from: give another "
                "--output"
            )
        if resumable:
            check_last_checkpoint(out)
        if runner.is_world_process_zero():
            write_recipe(out, recipe)
        runner.train(resume_from_checkpoint=resumable or None)
        metrics = runner.evaluate() if eval_split else {}
        if runner.is_world_process_zero():
            _write(out / "model", net, tokenizer, max_length, transform)
            with replacing(
                out / "log.json"
            ) as file:  # the last one: a training that has it is done
                file.write(json.dumps(runner.state.log_history, indent=1) + "\n")
            reached = (
                f", accuracy {metrics['eval_accuracy']:.2f} % on {eval_split}" if metrics else ""
            )
            print(f"the model is in {out / 'model'}{reached}")
    # Threads of a process group that outlive the interpreter abort it: a training that went well
    # would end in an error.
    runner.accelerator.wait_for_everyone()
    runner.accelerator.end_training()
    return metrics


def _use(attention: str, net: PreTrainedModel) -> None:
    """Set the kernel of the towers, and of a decoder, which the adapter leaves alone."""
    if find(net).tower_depth(net) or writes(net):
        net.set_attn_implementation(attention)


def _data(task: Task, split: str, examples: int, without: int) -> str:
    """What a training is on, in figures."""
    answers = f"{len(task.labels)} answers, " if task.loss_kind != "rank" and task.labels else ""
    return f"{task.name} {split}: {examples} examples, {answers}{without} examples without a target"


def _talk(runner: TaskTrainer, data: str, model: Path) -> None:
    """Lines in place of the Trainer's dicts."""
    runner.remove_callback(PrinterCallback)
    runner.remove_callback(ProgressCallback)
    if not runner.args.disable_tqdm:
        runner.add_callback(Bar())
    runner.add_callback(ReadableLog(data, model))


def _write(
    path: Path, net: PreTrainedModel, tokenizer: Any, max_length: int, transform: Any
) -> None:
    """Write the model's folder, whole or not at all, in the place of one of the same run that went
    on for longer."""
    patch = pumer.active(net)
    if patch is not None and isinstance(patch.reducer, pumer.Unreduced):
        pumer.remove(net)
    elif (
        patch is not None
    ):  # trained with whatever attention was fastest there; used with the fused one
        pumer.apply(net, patch.reducer, trim=patch.trim, renumber=patch.renumber)
    with new_folder(path, replace=True) as folder:
        save(net, folder)
        tokenizer.model_max_length = max_length
        save_tokenizer(tokenizer, folder)
        save_transform(transform, folder)
        save_processor(net.config, folder)
