"""Distillation at the point that was found, and what it is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from pumer.reducers import Reducer, to_dict


def finetune(recipe: str, base: str | Path, reducer: Reducer, out: str | Path, processes: int = 1) -> Path:
    """Train a model with a reducer on, taught by the same model unreduced, and give back the folder it is in.

    A training that was stopped goes on from its last checkpoint; one that is finished is left alone.

    Args:
        recipe: of `pumer train`, a file or a shipped one's name; its model, teacher and reducer are replaced.
        base: folder of the model, which is the teacher too.
        reducer: to train with.
        out: folder of the run.
        processes: that train together.

    Raises:
        ValueError: if the training fails, or was done with another reducer.
    """
    folder = Path(out)
    if (folder / "model").is_dir():
        done = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["reducer"]
        if done != json.loads(json.dumps(to_dict(reducer))):
            raise ValueError(f"{folder} holds a training with another reducer: give another --out")
        return folder / "model"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    resume = any(folder.glob("checkpoint-*"))
    command = [
        *(sys.executable, *launch, "-m", "pumer.cli", "train", "--config", recipe, "--output", str(folder)),
        *("--model.path", str(base), "--distill.teacher", str(base)),
        *("--reducer", json.dumps(to_dict(reducer)), "--resume", str(resume).lower()),
    ]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the training failed, what it said stands above: {' '.join(command)}")
    return folder / "model"
