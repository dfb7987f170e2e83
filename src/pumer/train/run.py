"""One training run: a recipe in, a model folder out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

import pumer
from pumer import presets
from pumer._extras import need
from pumer._files import check_folder, check_space, fingerprint, is_empty, locked, new_folder, replacing
from pumer._options import OutputFolder
from pumer.adapters import find
from pumer.data.augment import RandAugment
from pumer.data.images import open_image
from pumer.data.transforms import build_transform, load_transform, save_transform
from pumer.evaluate import take
from pumer.hub import save
from pumer.tasks.base import Blind, Example
from pumer.tasks.prompts import PromptCollator, collator_for, writes
from pumer.train.checkpoints import usable_checkpoints
from pumer.train.checks import check, check_teacher, uncached
from pumer.train.grounding import Grounded
from pumer.train.model import ModelSettings, model_path, prepare, read_model, start_parts
from pumer.train.optimizer import OptimizerSettings, parameter_groups, reducer_groups
from pumer.train.precision import in_bfloat16
from pumer.train.teacher import taught
from pumer.train.trainer import TaskTrainer
from pumer.train.writing import WritingTrainer

_LOG = logging.getLogger(__name__)
_SPACE = 16  # bytes of a weight: in the model, and in a checkpoint with two states of the optimizer


@dataclass
class DistillSettings:
    """The teacher.

    Args:
        teacher: folder of the unreduced model to distil from; none if not given.
        weight: of KL(teacher || student), next to 1 for the task's loss.
        temperature: of that divergence.
        cache: folder for the teacher's logits. They are then computed once, before training, and read in every epoch
            and by every other training that asks for the same; a file takes four bytes per example and answer. Delete
            it when the task's files change.
    """

    teacher: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    cache: str | None = None


@dataclass
class GroundingSettings:
    """Dense targets: what is under each patch, and whether the question means it.

    Args:
        weight: of that loss, next to 1 for the task's; 0 leaves it out.
        layer: the layer after which it is asked for. Later layers are left to carry what it teaches to the answer.
    """

    weight: float = 0.0
    layer: int = 4


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
    reducer_lr_multiplier: float = 10.0,
    itm_weight: float = 0.5,
    blind: Blind = None,
    train_split: str = "train",
    eval_split: str | None = "val",
    attention: Literal["sdpa", "eager"] = "sdpa",
    seed: int = 1,
    resume: bool = False,
    trainer: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Fine-tune a model on a task with its reducer on, and write it to `output`.

    Args:
        output: folder for checkpoints, logs and the finished model (`output`/model); new or empty unless `resume`.
        task: `name` and settings of the task.
        model: what is trained.
        reducer: a preset's name, or `reducer` and its settings; none trains the fused but unreduced model.
        distill: teacher and weight.
        image: image transform, `kind` and its settings; the model's own if not given.
        augment: change the pictures that are trained on.
        grounding: a loss on dense targets, for tasks that have them.
        optimizer: the published parameter groups; transformers' own if not given.
        reducer_lr_multiplier: learning rate of what a learned reducer trains, as a multiple of the model's.
        itm_weight: of image-text matching in retrieval, next to 1 for ranking, for models that have a head for it.
        blind: show the model the text alone, or the image alone, as a baseline; see `pumer.tasks.base.Collator`.
        train_split: split to train on.
        eval_split: split to evaluate on; none to leave it out.
        attention: kernel to train with; on CPUs "eager" is the faster one for small models.
        seed: of weights, order and dropout.
        resume: go on from the last checkpoint in `output`.
        trainer: settings of transformers' TrainingArguments; `bf16` is for machines that have such arithmetic, on a CPU
            without it the training is in float32.

    Returns:
        The metrics of the last evaluation. Where several processes train, their group ends with the training.

    Raises:
        ValueError: for settings that do not fit each other; nothing is written then.
    """
    recipe = {name: value for name, value in locals().items() if name not in ("output", "resume")}
    out = Path(output)
    check_folder(out)
    if not is_empty(out) and not resume:
        raise ValueError(
            f"{out} is not empty: give another --output, or --resume true to go on from its last checkpoint"
        )
    set_seed(seed)
    net, tokenizer, the_task = prepare(model, task)
    transform = build_transform(image) if image else load_transform(presets.model_folder(str(model.path)))
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
    check(net, the_task, settings, trainer or {}, augment=augment, dense=dense, blind=blind, optimizer=optimizer)
    if teacher is not None and distill:
        check_teacher(net, the_task, teacher)
        if distill.cache and (reason := uncached(net, the_task, augment, dense)):
            raise ValueError(f"{reason}: leave distill.cache out")
    chosen: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), **(trainer or {})}
    if settings.learned:  # every part has its say in every step, some of it twice
        chosen.setdefault("ddp_find_unused_parameters", False)
    if chosen.get("bf16") and not in_bfloat16(chosen):
        _LOG.warning("this processor has no bfloat16 arithmetic, and would be far slower with it: training in float32")
        chosen["bf16"] = False
    # YAML takes the word no, by which the Trainer means never, for false.
    chosen |= {name: "no" for name, value in chosen.items() if name.endswith("_strategy") and value is False}
    if "tensorboard" in (chosen.get("report_to") or ()):
        need("trainer.report_to: tensorboard", "train", "tensorboard")
    try:
        arguments = TrainingArguments(
            output_dir=str(out), seed=seed, remove_unused_columns=False, label_names=["labels"], **chosen
        )
    except TypeError as error:
        raise ValueError(
            f"trainer takes what TrainingArguments takes, but for what train itself sets: {error}"
        ) from None
    groups = None
    if optimizer or settings.learned:
        kind, options = TaskTrainer.get_optimizer_cls_and_kwargs(arguments, net)
        rates = arguments.learning_rate, arguments.weight_decay
        options["params"] = (
            parameter_groups(net, optimizer, *rates)
            if optimizer
            else reducer_groups(net, reducer_lr_multiplier, *rates)
        )
        groups = (kind, options)
    examples = Examples(the_task.examples(train_split), augment, seed)
    collator = replace(collator_for(net, the_task, tokenizer, transform, model.max_length), blind=blind)
    if teacher is not None and distill and distill.cache:
        about = {"teacher": fingerprint(model_path(str(distill.teacher))), "task": task, "split": train_split}
        examples.taught = taught(teacher, examples, collator, arguments, distill.cache, about)
    kind_of_trainer = TaskTrainer
    if isinstance(collator, PromptCollator):
        collator, kind_of_trainer = replace(collator, teach=True), WritingTrainer
    runner = kind_of_trainer(
        model=Grounded(net, dense.layer) if dense else net,
        args=arguments,
        data_collator=collator,
        train_dataset=examples,
        eval_dataset=Examples(the_task.examples(eval_split)) if eval_split else None,
        compute_metrics=kind_of_trainer.metrics,
        task=the_task,
        teacher=teacher,
        distill_weight=distill.weight if distill else 0.0,
        temperature=distill.temperature if distill else 1.0,
        grounding_weight=dense.weight if dense else 0.0,
        itm_weight=itm_weight,
        optimizer_cls_and_kwargs=groups,
        callbacks=[_Epochs(examples, the_task, train_split)],
    )
    check_space(out, _SPACE * sum(weight.numel() for weight in net.parameters()))
    # A kill leaves workers that end within seconds, and keep the folder until then.
    with locked(out, wait=10.0) if arguments.process_index == 0 else nullcontext():
        with arguments.main_process_first():
            resumable = resume and usable_checkpoints(out)
        if resume and not resumable and (out / "model").exists():
            raise ValueError(f"{out} holds a finished model and no checkpoint to go on from: give another --output")
        runner.train(resume_from_checkpoint=resumable or None)
        metrics = runner.evaluate() if eval_split else {}
        if runner.is_world_process_zero():
            # A model may be there of a run that was finished, and now goes on for longer.
            with new_folder(out / "model", replace=resume) as folder:
                _write(folder, net, tokenizer, model.max_length, transform)
            plain = {name: vars(value) if is_dataclass(value) else value for name, value in recipe.items()}
            with replacing(out / "recipe.yaml") as file:
                yaml.safe_dump(plain, file, sort_keys=False)
            with replacing(out / "log.json") as file:
                file.write(json.dumps(runner.state.log_history, indent=1) + "\n")
    # Threads of a process group that outlive the interpreter abort it: a training that went well would end in an error.
    runner.accelerator.wait_for_everyone()
    runner.accelerator.end_training()
    return metrics


class Examples(torch.utils.data.Dataset):
    """A task's examples as the loader wants them, several at a time where the task can do that.

    With `augment` their pictures are changed in each epoch in another way. It depends on `seed`, epoch and number of
    the example alone, so that a resumed run, or one with other loaders, sees the same.
    """

    def __init__(self, examples: Sequence[Example], augment: RandAugment | None = None, seed: int = 0) -> None:
        self.examples, self.augment, self.seed, self.epoch = examples, augment, seed, 0
        self.taught: Tensor | None = None
        """The teacher's logits of each, if they are known."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        examples = take(self.examples, indices)
        if self.taught is not None:
            found = zip(examples, self.taught[indices], strict=True)
            examples = [replace(example, meta={**example.meta, "taught": taught}) for example, taught in found]
        return list(map(self._augmented, indices, examples)) if self.augment else examples

    def _augmented(self, index: int, example: Example) -> Example:
        assert self.augment is not None
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)))
        name = f"the image of example {example.id}"
        images = tuple(self.augment(open_image(image, name=name), generator) for image in example.images)
        return replace(example, images=images)


class _Epochs(TrainerCallback):
    """Tells examples their epoch before a loader's workers take them along; texts to rank are drawn anew for each."""

    def __init__(self, examples: Examples, task: Any, split: str) -> None:
        self.examples, self.task, self.split = examples, task, split

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.examples.epoch = epoch = int(state.epoch or 0)
        if epoch and self.task.loss_kind == "rank":
            self.examples.examples = replace(self.task, seed=self.task.seed + epoch).examples(self.split)


def _use(attention: str, net: PreTrainedModel) -> None:
    """Set the kernel of the towers, and of a decoder, which the adapter leaves alone."""
    if find(net).tower_depth(net) or writes(net):
        net.set_attn_implementation(attention)


def _write(path: Path, net: PreTrainedModel, tokenizer: Any, max_length: int, transform: Any) -> None:
    patch = pumer.active(net)
    if patch is not None and isinstance(patch.reducer, pumer.Unreduced):
        pumer.remove(net)
    elif patch is not None:  # trained with whatever attention was fastest there; used with the fused one
        pumer.apply(net, patch.reducer)
    save(net, path)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(path)
    save_transform(transform, path)
