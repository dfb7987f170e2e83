"""What several commands need: a model folder opened, a task built, a reducer read from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

import pumer
from pumer.data.text import TextTransform
from pumer.data.transforms import load_transform
from pumer.hub import load
from pumer.reducers import Reducer, from_dict
from pumer.tasks import build
from pumer.tasks.base import Collator

ReducerSettings = str | dict[str, Any] | None
SHIPPED = Path(__file__).parent.parent / "assets"


def model_folder(model: str) -> Path:
    """The folder of a model: a path, or the name of a shipped one.

    Raises ValueError if there is neither.
    """
    for folder in (Path(model), SHIPPED / model):
        if (folder / "config.json").is_file():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
    raise ValueError(f"{model} is no model folder; shipped models are {shipped}")


def read_reducer(settings: ReducerSettings) -> Reducer:
    """A reducer from a preset's or a reducer's name, or from `{"reducer": name, setting: value, ...}`."""
    if isinstance(settings, dict):
        return from_dict(settings)
    if settings in pumer.presets.PRESETS:
        return pumer.presets.PRESETS[settings]
    return from_dict({"reducer": settings})


def open_model(model: str, reducer: ReducerSettings) -> PreTrainedModel:
    """A saved model with its own reduction in force, or with another one where `reducer` is given."""
    net = load(model_folder(model))
    if reducer is not None:
        pumer.apply(net, read_reducer(reducer))
    return net.eval()


def open_task(model: str, net: PreTrainedModel, task: str | dict[str, Any]) -> Collator:
    """A task with the labels, the tokenizer and the image transform of a model."""
    folder = model_folder(model)
    settings = {"name": task} if isinstance(task, str) else task
    built = build(settings, list(net.config.id2label.values()))
    length = net.config.max_position_embeddings
    return Collator(built, TextTransform(AutoTokenizer.from_pretrained(folder), length), load_transform(folder))
