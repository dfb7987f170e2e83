"""The training of one point: a process of its own, resumed where it was stopped."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from pumer.bench.run import using_threads
from pumer.study.measure import Subject
from pumer.study.points import Point
from pumer.tasks import build

_ON_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG, see prctl(2)
_SHOWN = 15


def train_point(recipe: dict[str, Any], folder: Path, processes: int, lock: IO[str]) -> Path:
    """Train a point, or go on where its training was stopped; returns the folder of the model.

    Args:
        recipe: settings of `train` without its output.
        folder: for all that the training writes.
        processes: that train together.
        lock: a locked file, which stays locked until the training has ended, even if this process is killed.

    Raises:
        ValueError: if the training fails, with the end of what it said.
    """
    output = folder / "training"
    if not (output / "log.json").is_file():  # which training writes last
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "recipe.yaml"
        config.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        resume = _usable_checkpoints(output)
        if not resume:
            shutil.rmtree(output, ignore_errors=True)
        words = ["train", "--config", str(config), "--output", str(output), "--resume", str(resume).lower()]
        launch(words, processes, folder / "training.txt", lock)
    return output / "model"


def launch(words: list[str], processes: int, log: Path, lock: IO[str]) -> None:
    """Run a command of `pumer` in new processes, which end when this one does; raises ValueError if it fails."""
    together = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [sys.executable, "-m", *(together if processes > 1 else []), "pumer.cli", *words]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]
        raise ValueError("\n".join([f"a training failed; the end of {log}:", *last]))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_ON_PARENTS_DEATH, signal.SIGTERM)


def _usable_checkpoints(output: Path) -> bool:
    """Whether there is a checkpoint to go on from; what a kill left unfinished is deleted."""
    found = False
    for checkpoint in output.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            found = True
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return found


def expected_seconds(point: Point, base: Subject, processes: int) -> float:
    """About how long the training of a point takes on this machine, from one step of the unreduced model."""
    recipe: dict[str, Any] = point.recipe or {}
    trainer = recipe.get("trainer", {})
    batch = trainer.get("per_device_train_batch_size", 8)
    steps = trainer.get("max_steps", -1)
    if steps < 1:
        labels = list(base.model.config.id2label.values())
        examples = len(build(recipe["task"], labels).examples(recipe.get("train_split", "train")))
        together = batch * processes * trainer.get("gradient_accumulation_steps", 1)
        steps = -(-examples // together) * trainer.get("num_train_epochs", 3)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    inputs = {name: value[:batch] if torch.is_tensor(value) else value for name, value in base.batches[0].items()}
    seconds = []
    with using_threads(max(1, cores // processes)):
        for _ in range(2):
            start = time.perf_counter()
            with torch.autocast(base.model.device.type, torch.bfloat16, enabled=bool(trainer.get("bf16"))):
                base.model(**inputs).logits.float().square().mean().backward()
                if recipe.get("distill"):
                    with torch.no_grad():
                        base.model(**inputs)
            seconds.append(time.perf_counter() - start)
    base.model.zero_grad(set_to_none=True)
    return float(steps * min(seconds) * batch / len(inputs["input_ids"]))
