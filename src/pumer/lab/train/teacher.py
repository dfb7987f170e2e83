"""The teacher's inputs and logits, computed in every step or cached."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from pumer._files import digest, replacing
from pumer.lab.data.text import TextTransform, load_tokenizer, same_tokenizer
from pumer.lab.data.transforms import load_transform
from pumer.lab.tasks.base import Collator, Example
from pumer.lab.tasks.labels import label_order
from pumer.lab.tasks.prompts import is_generative
from pumer.lab.train.model import model_path
from pumer.lab.train.trainer import TaskTrainer


@dataclass(frozen=True)
class TeachingCollator:
    """Batches for a student, with `teacher_inputs` from the teacher's own tokenizer and image
    transform."""

    student: Collator
    teacher: Collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self.student(examples)
        if self.student.image == self.teacher.image:
            pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        else:
            pixels = self.teacher.pixels(examples)
        return batch | {"teacher_inputs": self.teacher.texts(examples) | pixels}


def teachers_collator(teacher: PreTrainedModel, path: str, student: Collator) -> Collator:
    """The teacher's collator: the student's, or one with the tokenizer and transform of the
    teacher's folder.

    A generative teacher scores the student's own tokens, so its inputs must be the student's.

    Raises:
        ValueError: for a teacher with other labels, for a generative one with another tokenizer or
            image transform, and for a folder without a tokenizer.
    """
    folder = model_path(path)
    if not (folder / "pumer.json").is_file():  # a published checkpoint has neither
        text, image = student.text, student.image
    else:
        tokenizer, image = load_tokenizer(folder), load_transform(folder)
        longest = min(
            teacher.config.get_text_config().max_position_embeddings, tokenizer.model_max_length
        )
        text = TextTransform(tokenizer, longest, student.text.padding)
    same = same_tokenizer(text.tokenizer, student.text.tokenizer)
    if is_generative(teacher):
        different = ["tokenizer"] * (not same) + ["image transform"] * (image != student.image)
        if different:
            raise ValueError(
                f"the teacher {path} has another {' and another '.join(different)} than the "
                "student: generative models are distilled token by token, so use a teacher that "
                "was trained with the same"
            )
        return student
    order = None if student.task.loss_kind == "rank" else label_order(teacher.config, student.task)
    if same and text.max_length == student.text.max_length:
        text = student.text
    return replace(student, text=text, image=image, order=order)


def same_inputs(one: Collator, other: Collator) -> bool:
    """Whether two collators produce the same inputs."""
    return one.text is other.text and one.image == other.image


_ASKING = {
    "eval_strategy": "no",
    "dataloader_drop_last": False,
    "prediction_loss_only": False,
    "batch_eval_metrics": False,
    "eval_accumulation_steps": 16,  # to the host; they do not all fit on a GPU
}
"""Settings of the Trainer that computes the teacher's logits."""


def cached_teacher_logits(
    teacher: nn.Module,
    examples: Dataset,
    collator: Collator,
    arguments: TrainingArguments,
    folder: str,
    about: Any,
) -> Tensor:
    """The teacher's logits of every example, float32 [examples, labels], memory-mapped from a
    cache.

    Args:
        teacher: unreduced.
        examples: with targets, as they are trained on.
        collator: the teacher's, see `teachers_collator`.
        arguments: of the training; the teacher uses its precision and its processes.
        folder: the cache, with a file for each combination of everything that logits depend on.
        about: what the other arguments do not say of that, as JSON: teacher, task and split.
    """
    text = collator.text
    wanted = {
        "about": about,
        "examples": len(examples),  # type: ignore[arg-type]
        "image": repr(collator.image),
        "text": [text.max_length, text.tokenizer.get_vocab()],
        "blind": collator.blind,
        "precision": [arguments.bf16, arguments.fp16],
        **({} if collator.order is None else {"order": collator.order}),
    }
    path = Path(folder) / f"{digest(wanted)}.safetensors"
    # Checked once for all processes, because another training may be writing it.
    (is_cached,) = broadcast_object_list([path.is_file()])
    if not is_cached:
        asked = copy.copy(arguments)
        for name, value in _ASKING.items():
            setattr(asked, name, value)
        asker = TaskTrainer(model=teacher, args=asked, data_collator=collator, task=collator.task)
        logits = torch.as_tensor(asker.predict(examples).predictions, dtype=torch.float32)
        assert len(logits) == wanted["examples"]
        if asker.is_world_process_zero():
            with replacing(path, "wb") as file:
                save_file({"logits": logits}, file.name)
        asker.accelerator.wait_for_everyone()
    return load_file(path)["logits"]
