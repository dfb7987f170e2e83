"""A task's examples as a dataset for the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pumer.lab.data.augment import RandAugment
from pumer.lab.data.images import open_image
from pumer.lab.evaluate import take
from pumer.lab.tasks.base import Example, Task

_NAMED = 5


class Examples(torch.utils.data.Dataset):
    """A task's examples, fetched in batches where the task supports it.

    With `augment` images are augmented differently in every epoch. The augmentation depends only on
    `seed`, epoch and index of the example, so resumed runs and other numbers of workers see the
    same images.
    """

    def __init__(
        self, examples: Sequence[Example], augment: RandAugment | None = None, seed: int = 0
    ) -> None:
        self.examples, self.augment, self.seed, self.epoch = examples, augment, seed, 0
        self.teacher_logits: Tensor | None = None
        """The teacher's logits of each, if they are known."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        examples = take(self.examples, indices)
        if self.teacher_logits is not None:
            pairs = zip(examples, self.teacher_logits[indices], strict=True)
            examples = [
                replace(example, meta={**example.meta, "teacher_logits": teacher_logits})
                for example, teacher_logits in pairs
            ]
        return list(map(self._augmented, indices, examples)) if self.augment else examples

    def _augmented(self, index: int, example: Example) -> Example:
        assert self.augment is not None
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)))
        name = f"the image of example {example.id}"
        images = tuple(
            self.augment(open_image(image, name=name), generator) for image in example.images
        )
        return replace(example, images=images)


class Epochs(TrainerCallback):
    """Set the epoch of the examples before the loader's workers copy them; ranking tasks sample new
    texts for each epoch."""

    def __init__(self, examples: Examples, task: Any, split: str) -> None:
        self.examples, self.task, self.split = examples, task, split

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.examples.epoch = epoch = int(state.epoch or 0)
        if epoch and self.task.loss_kind == "rank":
            self.examples.examples = replace(self.task, seed=self.task.seed + epoch).examples(
                self.split
            )


def count_without_target(examples: Sequence[Example], task: Task, split: str) -> int:
    """Count examples that cannot be learned from, because none of their answers is a label of the
    task.

    Raises:
        ValueError: if this is true of all of them, for unlabelled examples, and for an empty split.
    """
    if not len(examples):
        raise ValueError(f"{task.name} has no example in {split}: give another split")
    targets = getattr(examples, "targets", None)
    if (
        targets is None or task.loss_kind == "rank"
    ):  # generated examples always have a target, and so do ranked texts
        return 0
    without = unlabelled = 0
    for target in targets():
        unlabelled += target is None
        without += target == {}
    if unlabelled:
        raise ValueError(
            f"{unlabelled} of {len(examples)} examples of {task.name} {split} have no label: "
            "train on a labelled split"
        )
    if without == len(examples):
        answers = ", ".join(task.labels[:_NAMED])
        raise ValueError(
            f"none of the {without} examples of {task.name} {split} has an answer among the "
            f"model's {len(task.labels)} ({answers}, ...): give --task.answers data for a new list "
            "of answers, counted in the data"
        )
    return without
