"""The training of one point, in a separate process that resumes where it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from pumer._files import replacing
from pumer.lab.bench.run import using_threads
from pumer.lab.bench.timing import wait
from pumer.lab.study.evaluation import EvalModel
from pumer.lab.study.points import Point
from pumer.lab.tasks import build
from pumer.lab.tasks.base import Example
from pumer.lab.tasks.prompts import vocabulary
from pumer.lab.train.launch import train_once
from pumer.lab.train.precision import in_bfloat16


def train_point(recipe: dict[str, Any], folder: Path, processes: int, lock: IO[str]) -> Path:
    """Train a point, or resume its training; returns the folder of the model.

    Args:
        recipe: settings of `train` without its output.
        folder: for the training's output.
        processes: that train together.
        lock: a locked file, which stays locked until the training has ended, even if this process
            is killed.

    Raises:
        ValueError: if the training fails, with the end of its output.
    """
    config = folder / "recipe.yaml"
    with replacing(config) as file:
        yaml.safe_dump(recipe, file, sort_keys=False)
    return train_once(folder, ["--config", str(config)], processes, lock)


def expected_seconds(
    point: Point, base: EvalModel, examples: Sequence[Example], processes: int
) -> float:
    """Estimated duration of a point's training on this machine, from one step of the unreduced
    model."""
    recipe: dict[str, Any] = point.recipe or {}
    trainer = recipe.get("trainer", {})
    batch = trainer.get("per_device_train_batch_size", 8)
    steps = trainer.get("max_steps", -1)
    if steps < 1:
        num_examples = len(
            build(recipe["task"], vocabulary(base.model)).examples(
                recipe.get("train_split", "train")
            )
        )
        together = batch * processes * trainer.get("gradient_accumulation_steps", 1)
        steps = -(-num_examples // together) * trainer.get("num_train_epochs", 3)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    shown = examples[:batch]
    (inputs,) = base.on(shown, batch).batches
    seconds = []
    with using_threads(max(1, cores // processes)):
        for _ in range(2):
            wait(base.device)
            start = time.perf_counter()
            with torch.autocast(
                base.model.device.type, torch.bfloat16, enabled=in_bfloat16(trainer)
            ):
                base.model(**inputs).logits.float().square().mean().backward()
                if recipe.get("distill"):
                    with torch.no_grad():
                        base.model(**inputs)
            wait(base.device)
            seconds.append(time.perf_counter() - start)
    base.model.zero_grad(set_to_none=True)
    return float(steps * min(seconds) * batch / len(shown))
