"""One training run: a recipe in, a model folder out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed

import pumer
from pumer import presets
from pumer.data.text import TextTransform
from pumer.data.transforms import build_transform, load_transform, save_transform
from pumer.hub import load, save
from pumer.models.vilt.start import start_local
from pumer.tasks import Task, build
from pumer.tasks.base import Collator, Example
from pumer.train.grounding import Grounded
from pumer.train.trainer import TaskTrainer, accuracy


@dataclass
class ModelSettings:
    """Where the model comes from.

    Args:
        path: a model folder to start from; its tokenizer and image transform are taken along.
        kind: the model class for a new model, or for a new head on `path`.
        config: of a new model, as transformers' ViltConfig takes it.
        tokenizer: folder of the tokenizer of a new model.
        patch_size: cut pictures into patches of this size, in pixels, if the model at `path` has another.
        max_length: longest text in tokens.
    """

    path: str | None = None
    kind: str = "ViltForQuestionAnswering"
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    patch_size: int | None = None
    max_length: int = 40


@dataclass
class DistillSettings:
    """The teacher.

    Args:
        teacher: folder of the unreduced model to distil from; none if not given.
        weight: of KL(teacher || student), next to 1 for the task's loss.
        temperature: of that divergence.
    """

    teacher: str | None = None
    weight: float = 1.0
    temperature: float = 1.0


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
    output: str,
    task: dict[str, Any],
    model: ModelSettings,
    reducer: str | dict[str, Any] | None = None,
    distill: DistillSettings | None = None,
    image: dict[str, Any] | None = None,
    grounding: GroundingSettings | None = None,
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
        grounding: a loss on dense targets, for tasks that have them.
        train_split: split to train on.
        eval_split: split to evaluate on; none to leave it out.
        attention: kernel to train with; on CPUs "eager" is the faster one for small models.
        seed: of weights, order and dropout.
        resume: go on from the last checkpoint in `output`.
        trainer: settings of transformers' TrainingArguments.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ValueError: for settings that do not fit each other; nothing is written then.
    """
    out = Path(output)
    if out.exists() and any(out.iterdir()) and not resume:
        raise ValueError(
            f"{out} is not empty: give another --output, or --resume true to go on from its last checkpoint"
        )
    set_seed(seed)
    net, tokenizer, the_task = _prepare(model, task)
    transform = build_transform(image) if image else load_transform(presets.model_folder(str(model.path)))
    settings = pumer.Unreduced() if reducer is None else presets.read_reducer(reducer)
    pumer.apply(net, settings, attention=attention)
    teacher = None
    if distill and distill.teacher:
        teacher = pumer.apply(
            load(presets.model_folder(distill.teacher), dtype=torch.float32), pumer.Unreduced(), attention=attention
        )
    dense = grounding if grounding and grounding.weight else None
    if dense and any(settings.reduces_at(layer) for layer in range(-1, net.config.num_hidden_layers)):
        raise ValueError("dense targets need every patch: train them without a reducer")

    chosen = {"use_cpu": not torch.cuda.is_available(), **(trainer or {})}
    arguments = TrainingArguments(
        output_dir=str(out), seed=seed, remove_unused_columns=False, label_names=["labels"], **chosen
    )
    collator = Collator(the_task, TextTransform(tokenizer, model.max_length), transform)
    runner = TaskTrainer(
        model=Grounded(net, dense.layer) if dense else net,
        args=arguments,
        data_collator=collator,
        train_dataset=Examples(the_task.examples(train_split)),
        eval_dataset=Examples(the_task.examples(eval_split)) if eval_split else None,
        compute_metrics=lambda prediction: {
            "accuracy": accuracy(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)).item()
        },
        task=the_task,
        teacher=teacher,
        distill_weight=distill.weight if distill else 0.0,
        temperature=distill.temperature if distill else 1.0,
        grounding_weight=dense.weight if dense else 0.0,
    )
    runner.train(resume_from_checkpoint=True if resume else None)
    metrics = runner.evaluate() if eval_split else {}
    if runner.is_world_process_zero():
        _write(out / "model", net, tokenizer, transform)
        recipe = {
            "task": task,
            "model": vars(model),
            "reducer": reducer,
            "image": image,
            "grounding": vars(grounding) if grounding else None,
            "distill": vars(distill) if distill else None,
            "attention": attention,
            "seed": seed,
            "trainer": trainer,
        }
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        (out / "log.json").write_text(json.dumps(runner.state.log_history, indent=1) + "\n")
    return metrics


class Examples(torch.utils.data.Dataset):
    """A task's examples as the loader wants them, several at a time where the task can do that."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        many = getattr(self.examples, "__getitems__", None)
        return many(indices) if many else [self.examples[index] for index in indices]


def _prepare(settings: ModelSettings, task: dict[str, Any]) -> tuple[PreTrainedModel, Any, Task]:
    """Model, tokenizer and task; a new head where the labels are others."""
    if settings.path is None:
        if settings.tokenizer is None:
            raise ValueError("a new model needs model.tokenizer, the folder of its tokenizer")
        the_task = build(task)
        config = _class("ViltConfig")(**settings.config, **_label_names(the_task))
        return start_local(_class(settings.kind)(config)), AutoTokenizer.from_pretrained(settings.tokenizer), the_task
    net = pumer.remove(load(presets.model_folder(settings.path), dtype=torch.float32))
    the_task = build(task, list(net.config.id2label.values()))
    if list(net.config.id2label.values()) != list(the_task.labels):
        config = net.config
        for name, value in _label_names(the_task).items():
            setattr(config, name, value)
        headless = {name: value for name, value in net.state_dict().items() if not name.startswith("classifier")}
        net = _class(settings.kind)(config)
        net.load_state_dict(headless, strict=False)
    if settings.patch_size and settings.patch_size != net.config.patch_size:
        from pumer.models.vilt.resize import resize_patches

        net = resize_patches(net, settings.patch_size)
    return net, AutoTokenizer.from_pretrained(presets.model_folder(settings.path)), the_task


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _label_names(task: Task) -> dict[str, Any]:
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: number for number, label in enumerate(task.labels)},
    }


def _write(path: Path, net: PreTrainedModel, tokenizer: Any, transform: Any) -> None:
    patch = pumer.active(net)
    if patch is not None and isinstance(patch.reducer, pumer.Unreduced):
        pumer.remove(net)
    elif patch is not None:  # trained with whatever attention was fastest there; used with the fused one
        pumer.apply(net, patch.reducer)
    save(net, path)
    tokenizer.save_pretrained(path)
    save_transform(transform, path)
