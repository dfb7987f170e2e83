"""Distillation at the setting that was found."""

from __future__ import annotations

import json
from pathlib import Path

from pumer._files import fingerprint, locked, replacing
from pumer.lab.train.launch import train_once
from pumer.lab.train.recipe import read_recipe
from pumer.reducers import Reducer, to_dict


def finetune(
    recipe: str, base: str | Path, reducer: Reducer, out: str | Path, processes: int = 1
) -> Path:
    """Fine-tune a model with a reducer, taught by the same model unreduced; returns its folder.

    A stopped training resumes from its last checkpoint; a finished one is kept.

    Args:
        recipe: of `pumer train`, a file or a shipped one's name; its model, teacher and reducer are
            replaced.
        base: folder of the model, which is the teacher too.
        reducer: to train with.
        out: folder of the run, which also gets training.txt, its log.
        processes: that train together.

    Raises:
        ValueError: if the training fails, or another one lies in the folder.
    """
    folder, settings = Path(out), json.loads(json.dumps(to_dict(reducer)))
    wanted = {
        "reducer": settings,
        "recipe": read_recipe(recipe),
        "model": fingerprint(Path(base)),
        "processes": processes,
    }
    with locked(folder) as lock:
        record_file = folder / "wanted.json"
        if not record_file.is_file() and (folder / "training").exists():
            raise ValueError(
                f"nothing tells what the training in {folder} is of: delete it, or give another "
                "--out"
            )
        if record_file.is_file():
            recorded = json.loads(record_file.read_text(encoding="utf-8"))
            other = [
                name
                for name, value in json.loads(json.dumps(wanted)).items()
                if recorded.get(name) != value
            ]
            if other:
                raise ValueError(
                    f"{folder} holds a training with another {', '.join(other)}: delete it, or "
                    "give another --out"
                )
        with replacing(record_file) as file:
            json.dump(wanted, file)
        words = ["--config", recipe, "--model.path", str(base), "--distill.teacher", str(base)]
        return train_once(folder, [*words, "--reducer", json.dumps(settings)], processes, lock)
