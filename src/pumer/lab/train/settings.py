"""The settings of a training: the options of `pumer train`, and the keys of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from pumer._options import Count, OutputFolder, Positive, Weight
from pumer.lab.data.augment import RandAugment
from pumer.lab.tasks.base import Blind
from pumer.lab.train.model import ModelSettings
from pumer.lab.train.optimizer import OptimizerSettings


@dataclass
class DistillSettings:
    """The teacher.

    Args:
        teacher: folder of the unreduced model to distil from; none if not given.
        weight: weight of the distillation loss, KL(teacher || student); the task's loss has weight
            1.
        temperature: softmax temperature of the distillation loss.
        cache: folder for the teacher's logits. They are computed once, before training, and reused
            in every epoch and by later trainings with the same teacher and data. Four bytes per
            example and answer. Delete it when the task's files change.
    """

    teacher: str | None = None
    weight: Weight = 1.0
    temperature: Positive = 1.0
    cache: str | None = None


@dataclass
class GroundingSettings:
    """Dense targets: what each patch shows, and whether the question asks about it.

    Args:
        weight: weight of the grounding loss; the task's loss has weight 1; 0 turns it off.
        layer: the layer after which patches are classified; later layers carry the result to the
            answer.
    """

    weight: Weight = 0.0
    layer: int = 4


@dataclass
class EarlyStoppingSettings:
    """Stop once evaluations no longer improve, and keep the best model.

    Args:
        patience: evaluations without improvement before the training stops.
        threshold: smallest improvement that counts, in percent of accuracy, or in loss if
            `trainer.metric_for_best_model` is "loss".
    """

    patience: Count = 3
    threshold: float = 0.0


@dataclass
class TrainSettings:
    """One training.

    Args:
        output: folder for checkpoints, logs and the trained model (`output`/model); new or empty
            unless `resume`.
        task: `name` and settings of the task: `root`, `images` and `skip` of those in files; of
            vqav2 also `labels`, the answers to choose from, and `answers`, `min_count` and
            `answer_splits` for a new list of them, see docs/training.md.
        model: the model to train.
        reducer: a preset's name, or `reducer` and its settings; none trains the fused but unreduced
            model.
        distill: a teacher to distil from.
        image: image transform: `kind` (square, crop or keep_aspect) and its settings; the model's
            own if not given.
        augment: RandAugment on the training images.
        grounding: a loss on dense targets, for tasks that have them.
        optimizer: the published parameter groups; transformers' own if not given.
        reducer_lr_multiplier: learning rate of a learned reducer's parameters, as a multiple of the
            model's.
        itm_weight: weight of the image-text matching loss in retrieval, for models with a head for
            it; ranking has 1.
        blind: show the model the text alone, or the image alone, as a baseline.
        train_split: split to train on.
        eval_split: split to evaluate on; none to skip evaluation.
        early_stopping: stop once evaluations no longer improve; after every epoch, unless `trainer`
            says otherwise.
        attention: attention kernel to train with; on CPUs "eager" is faster for small models.
        seed: seed of new weights, order of examples and dropout.
        resume: continue from the last checkpoint in `output`.
        trainer: settings of transformers' TrainingArguments; on a CPU without bfloat16 arithmetic
            `bf16` is ignored and the training runs in float32.
    """

    output: OutputFolder
    task: dict[str, Any]
    model: ModelSettings
    reducer: str | dict[str, Any] | None = None
    distill: DistillSettings | None = None
    image: dict[str, Any] | None = None
    augment: RandAugment | None = None
    grounding: GroundingSettings | None = None
    optimizer: OptimizerSettings | None = None
    reducer_lr_multiplier: Weight = 10.0
    itm_weight: Weight = 0.5
    blind: Blind = None
    train_split: str = "train"
    eval_split: str | None = "val"
    early_stopping: EarlyStoppingSettings | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 1
    resume: bool = False
    trainer: dict[str, Any] | None = None

    @property
    def dense(self) -> GroundingSettings | None:
        """`grounding`, unless its weight is 0."""
        return self.grounding if self.grounding and self.grounding.weight else None

    def recipe(self) -> dict[str, Any]:
        """The settings that a recipe holds: all but `output` and `resume`."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("output", "resume")
        }
