"""Read files of unknown origin, with errors that name the damaged file."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pumer.reducers.base import MAX_LAYERS

_LIGHTNING = ("pytorch_lightning.", "lightning.")


def read_json(file: Path, hint: str) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, with the hint if there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {file}: {hint}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged, it should hold a JSON object: get it again")
    return content


def read_config(folder: Path, hint: str) -> dict[str, Any]:
    """A model folder's config.json; raises ValueError for absurd numbers of layers."""
    config = read_json(folder / "config.json", hint)
    for name, value in _numbers(config):
        if ("layer" in name or "depth" in name) and value > MAX_LAYERS:
            raise ValueError(
                f"{folder / 'config.json'} is damaged, its {name} is {value}: get it again"
            )
    return config


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in a config, with their names."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers(value, key)
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, name)
    elif isinstance(config, int | float):
        yield name, config


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The weights in a folder, from `model.safetensors` or `pytorch_model.bin`.

    Raises:
        ValueError: if there are none, or the file is damaged or contains something else, such as
            code.
    """
    files = [directory / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin: download one of them"
        )
    with _named(file):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    return _check(state, file, "save the model's state_dict() alone")


def read_lightning(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and hyperparameters of a PyTorch Lightning checkpoint.

    Raises:
        ValueError: if the file is missing or damaged, or contains something else, such as code.
    """
    if not file.is_file():
        raise ValueError(
            f"there is no {file}: give a checkpoint's folder, or an original .ckpt file"
        )
    with _named(file):
        stand_ins: list[Any] = []
        if zipfile.is_zipfile(file):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            stand_ins = [
                (dict if name.endswith(".AttributeDict") else _StandIn, name)
                for name in names
                if name.startswith(_LIGHTNING)
            ]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(
            f"{file} is no Lightning checkpoint, it has no state_dict: for other files give their "
            "folder"
        )
    made_with = content.get("hyper_parameters")
    config = made_with.get("config") if isinstance(made_with, dict) else None
    state = _check(content["state_dict"], file, "its state_dict should be weights alone")
    return state, config if isinstance(config, dict) else {}


class _StandIn:
    """An inert stand-in for Lightning's classes, which its checkpoints name for callbacks."""

    def __new__(cls, *args: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Add the file's name to errors."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds pickled code, which is never run: get it again, or as "
            f"safetensors ({error})"
        ) from error
    except Exception as error:  # truncated files raise many kinds of errors
        raise ValueError(f"{file} is damaged, get it again: {error}") from error


def _check(state: Any, file: Path, hint: str) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise ValueError(f"{file} holds something else than named weights: {hint}")
    return dict(state)


# --- answers ---

ANSWERS = ("vqa2_label2ans.json", "vqa2_ans2label.json", "vqa_dict.json")
"""File names of answer vocabularies: PuMer's list and object, and ViLT's. Their orders differ."""


def find_answers(directory: Path, names: Iterable[str] = ANSWERS) -> list[str] | None:
    """The answer vocabulary in a folder, None without one.

    Raises:
        ValueError: if one is damaged, or they contradict each other.
    """
    answers_by_file = {
        file: read_answers(file) for name in names if (file := directory / name).exists()
    }
    if len({tuple(answers) for answers in answers_by_file.values()}) > 1:
        raise ValueError(
            f"{' and '.join(map(str, answers_by_file))} number the answers differently: "
            "delete the wrong one"
        )
    return next(iter(answers_by_file.values()), None)


def read_answers(file: Path) -> list[str]:
    """Answers in order: from a list, or an object answer -> index or index -> answer.

    Raises:
        ValueError: if the file is damaged, or the numbers are not 0, 1, 2, ...
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): get it again, or delete it") from error
    if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
        content = [content.get(str(index)) for index in range(len(content))]
    elif isinstance(content, dict) and all(isinstance(value, int) for value in content.values()):
        answers = {index: answer for answer, index in content.items()}
        content = [answers.get(index) for index in range(len(content))]
    valid = isinstance(content, list) and all(isinstance(answer, str) for answer in content)
    if not valid or len(set(content)) != len(content) or not content:
        raise ValueError(
            f"{file} should be a list of answers, or an object of answers and their numbers from "
            "0, each once: get it again, or delete it"
        )
    return content


def write_answers(directory: Path, answers: list[str]) -> None:
    """Write an answer vocabulary in both of PuMer's formats."""
    by_answer = {answer: index for index, answer in enumerate(answers)}
    (directory / "vqa2_label2ans.json").write_text(json.dumps(answers), encoding="utf-8")
    (directory / "vqa2_ans2label.json").write_text(
        json.dumps(by_answer, indent=2), encoding="utf-8"
    )
