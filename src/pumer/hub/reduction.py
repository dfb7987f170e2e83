"""A model's reducer on disk: `pumer.json`, and `reducer.safetensors` with learned weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pumer._files import replacing
from pumer._settings import check_settings
from pumer._version import __version__
from pumer.adapters.base import PARTS, Patch
from pumer.hub.files import read_json
from pumer.hub.sources import Source, find_source
from pumer.reducers import Reducer, from_dict, to_dict

FORMAT = 1
"""Version of the contents of `pumer.json`."""
SETTINGS = "pumer.json"
LEARNED = "reducer.safetensors"
"""File with the weights of a learned reducer."""
_PREFIX = f"{PARTS}."


@dataclass
class _Saved:
    """The contents of `pumer.json`."""

    format: int
    pumer: str
    reducer: dict[str, Any] | None
    attention: str
    trim: bool
    # Written only if true; older folders lack them.
    renumber: bool = False
    pack: bool = False


_OPTIONAL = {field.name for field in fields(_Saved) if field.default is not MISSING}


def write_reduction(
    folder: Path, patch: Patch | None, parts: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model's reducer, with its learned weights, beside the model's weights.

    Args:
        folder: of the weights.
        patch: of the model; None for an unreduced one.
        parts: weights of a learned reducer; see `trained_parts`.
    """
    settings: dict[str, Any] = {
        "format": FORMAT,
        "pumer": __version__,
        "reducer": None if patch is None else to_dict(patch.reducer),
        "attention": "sdpa" if patch is None else patch.attention,
        "trim": True if patch is None else patch.trim,
    }
    settings |= {name: True for name in _OPTIONAL if getattr(patch, name, False)}
    if parts:
        with replacing(folder / LEARNED, "wb") as file:
            # Cloned, because safetensors does not save weights that share memory.
            save_file(
                {name: x.detach().cpu().contiguous().clone() for name, x in parts.items()},
                file.name,
            )
    else:
        # Left over from another reducer, if the folder is overwritten.
        (folder / LEARNED).unlink(missing_ok=True)
    with replacing(folder / SETTINGS) as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def trained_parts(
    patch: Patch | None, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of a learned reducer; empty for others.

    Taken from `state`, the model's state dict, if they are in it: a sharded model has its complete
    weights only there.
    """
    if patch is None or patch.parts is None:
        return {}
    gathered = {
        name.partition(_PREFIX)[2]: x for name, x in (state or {}).items() if _PREFIX in name
    }
    return gathered or dict(patch.parts.state_dict())


def without_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights without those of a learned reducer."""
    return {name: x for name, x in state.items() if _PREFIX not in name}


def is_part(name: str) -> bool:
    """Whether a model's weight belongs to a learned reducer."""
    return name.startswith(_PREFIX)


def saved_reducer(path: str | Path, **hub: Any) -> Reducer | None:
    """The reducer that a model was saved with, None for an unreduced one; raises ValueError like
    `load`."""
    source = find_source(path, [SETTINGS], **hub)
    return reducer_in(read_settings(source), source.folder / SETTINGS)


def read_settings(source: Source) -> dict[str, Any]:
    """The contents of `pumer.json`; raises ValueError if it is missing or damaged."""
    hint = (
        "for published checkpoints use pumer.load_official, for other models from_pretrained and "
        "pumer.apply"
    )
    if "revision" in source.hub and not source.has(SETTINGS):
        raise ValueError(f"{source.name} on the Hub has no {SETTINGS}, which pumer writes: {hint}")
    return read_json(source.folder / SETTINGS, f"pumer.save writes it; {hint}")


def reducer_in(settings: dict[str, Any], file: Path) -> Reducer | None:
    """The reducer in the contents of `pumer.json`; raises ValueError for invalid settings."""
    version = settings.get("format")
    if type(version) is not int or version < 1:  # JSON's true is an int to isinstance
        raise ValueError(f"{file} is damaged, its format is {version!r}: save the model again")
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by pumer {settings.get('pumer')}; this is pumer "
            f"{__version__}, which reads format {FORMAT}: upgrade pumer"
        )
    names = sorted({field.name for field in fields(_Saved)} - (_OPTIONAL - set(settings)))
    if sorted(settings) != names:
        raise ValueError(f"{file} should have the entries {names}, not {sorted(settings)}")
    check_settings(_Saved, settings, str(file))
    if settings["reducer"] is None:
        return None
    try:
        return from_dict(settings["reducer"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the reducer in {file} cannot be made: {error}") from error


def load_parts(patch: Patch | None, path: Path) -> None:
    """Load the weights of a learned reducer; raises ValueError if they do not fit."""
    if patch is None or patch.parts is None:
        return
    if not (path / LEARNED).is_file():
        raise ValueError(
            f"{path} lacks {LEARNED}, the weights of its reducer {patch.reducer.name}: save the "
            "model again"
        )
    try:
        patch.parts.load_state_dict(load_file(path / LEARNED))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path / LEARNED} does not fit the reducer, save the model again: {error}"
        ) from error
