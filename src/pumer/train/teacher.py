"""What a teacher says of every example: asked for once, then read, in later epochs and in later trainings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from pumer._files import digest, replacing
from pumer.tasks.base import Collator
from pumer.train.trainer import TaskTrainer

_ASKING = {
    "eval_strategy": "no",
    "dataloader_drop_last": False,
    "prediction_loss_only": False,
    "batch_eval_metrics": False,
    "eval_accumulation_steps": 16,  # on the host; there is no place for all on a GPU
}
"""Settings of the Trainer that asks the teacher, whatever they are for the training."""


def taught(
    teacher: nn.Module, examples: Dataset, collator: Collator, arguments: TrainingArguments, folder: str, about: Any
) -> Tensor:
    """The teacher's logits of every example, float32 [examples, labels], of which only what is used is read.

    Args:
        teacher: unreduced.
        examples: with targets, in the form that they are trained in.
        collator: that they are trained with.
        arguments: of the training; the teacher has its precision, and its processes share the work.
        folder: where the logits lie, a file for each combination of all that they depend on.
        about: of that what the other arguments do not tell, as JSON has it: teacher, task and split.
    """
    text = collator.text
    wanted = {
        "about": about,
        "examples": len(examples),  # type: ignore[arg-type]
        "image": repr(collator.image),
        "text": [text.max_length, text.tokenizer.get_vocab()],
        "blind": collator.blind,
        "precision": [arguments.bf16, arguments.fp16],
    }
    path = Path(folder) / f"{digest(wanted)}.safetensors"
    (known,) = broadcast_object_list([path.is_file()])  # another training may just be writing it
    if not known:
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
