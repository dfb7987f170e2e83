"""Distillation at the point that was found, and what it is worth."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pumer.reducers import Reducer, to_dict
from pumer.train.launch import locked, train_once


def finetune(recipe: str, base: str | Path, reducer: Reducer, out: str | Path, processes: int = 1) -> Path:
    """Train a model with a reducer on, taught by the same model unreduced, and give back the folder it is in.

    A training that was stopped goes on from its last checkpoint; one that is finished is left alone.

    Args:
        recipe: of `pumer train`, a file or a shipped one's name; its model, teacher and reducer are replaced.
        base: folder of the model, which is the teacher too.
        reducer: to train with.
        out: folder of the run, which also gets training.txt, all that it says.
        processes: that train together.

    Raises:
        ValueError: if the training fails, or was done with another reducer.
    """
    folder, wanted = Path(out), json.loads(json.dumps(to_dict(reducer)))
    training = folder / "training"
    with locked(folder) as lock:
        if (training / "log.json").is_file():
            done = yaml.safe_load((training / "recipe.yaml").read_text(encoding="utf-8"))["reducer"]
            if done != wanted:
                raise ValueError(f"{folder} holds a training with another reducer: give another --out")
        words = ["--config", recipe, "--model.path", str(base), "--distill.teacher", str(base)]
        return train_once(folder, [*words, "--reducer", json.dumps(wanted)], processes, lock)
