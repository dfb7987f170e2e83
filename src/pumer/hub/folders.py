"""Our own folders: what transformers writes, and `pumer.json` with the reduction in force."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from pumer._files import new_folder
from pumer._settings import check_settings
from pumer._suggest import did_you_mean
from pumer._version import __version__
from pumer.adapters.base import PARTS, adapters
from pumer.api import active, apply
from pumer.hub.files import read_config, read_json, some
from pumer.presets import model_folder
from pumer.reducers import Reducer, from_dict, to_dict

FORMAT = 1
"""Version of what `pumer.json` holds."""
SETTINGS = "pumer.json"
LEARNED = "reducer.safetensors"
"""File of what a learned reducer has trained."""


@dataclass
class _Saved:
    """What `pumer.json` holds."""

    format: int
    pumer: str
    reducer: dict[str, Any] | None
    attention: str
    trim: bool
    renumber: bool = False  # written where it is true: older folders have none


def save(model: Any, path: str | Path) -> None:
    """Write a model with the reduction in force: what `save_pretrained` writes, and `pumer.json`.

    The folder appears complete or not at all. A model that nothing reduces may be saved too.

    Args:
        model: any Hugging Face model.
        path: a folder that does not exist yet, or is empty.

    Raises:
        ValueError: if the folder holds files already, or the model is none of Hugging Face's.
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} is not a Hugging Face model: save the one inside it")
    patch = active(model)
    settings = {
        "format": FORMAT,
        "pumer": __version__,
        "reducer": None if patch is None else to_dict(patch.reducer),
        "attention": "sdpa" if patch is None else patch.attention,
        "trim": True if patch is None else patch.trim,
    }
    if patch is not None and patch.renumber:
        settings["renumber"] = True
    parts = None if patch is None else patch.parts
    with new_folder(path) as folder:
        if parts is None:
            model.save_pretrained(folder)
        else:  # in a file of their own, so that the folder is still one for `from_pretrained`
            weights = {name: x for name, x in model.state_dict().items() if not name.startswith(f"{PARTS}.")}
            model.save_pretrained(folder, state_dict=weights)
            save_file({name: x.contiguous() for name, x in parts.state_dict().items()}, folder / LEARNED)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """Read what `save` wrote: the model in eval mode, with the same reduction in force.

    Args:
        path: the folder, or the name of a model that comes with the package (`pumer list`).
        dtype: of the weights; as they were saved if not given.
        device: where the model goes; the CPU if not given.

    Raises:
        ValueError: if a file is missing or damaged, or was written by a newer pumer.
    """
    path = Path(path) if Path(path).exists() else model_folder(path)
    settings = _settings(path)
    reducer = _read_settings(settings, path / SETTINGS)
    config = read_config(path, "save the model again")
    kind = class_in(config, path)
    try:
        with _quiet():  # what does not fit is said below
            model, info = kind.from_pretrained(
                path, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever safetensors, torch and transformers make of a damaged file
        raise ValueError(f"the model in {path} cannot be read, save it again: {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {path} lack {some(info['missing_keys'])}, which the {kind.__name__} of its config.json "
            "has: restore its config.json, or save the model again"
        )
    if info["unexpected_keys"]:
        raise ValueError(
            f"the weights in {path} have {some(info['unexpected_keys'])}, which the {kind.__name__} of its "
            "config.json has not: restore its config.json, or save the model again"
        )
    if device is not None:
        model.to(device)
    if reducer is not None:
        names = ("attention", "trim", "renumber")
        force = {name: settings[name] for name in names if name in settings}
        apply(model, reducer, **force)
        load_parts(model, path)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


_ENCODERS = ("vilt", "meter")
"""Model types that choose from labels, and that no processor of transformers alone is enough for."""


def is_stock(model: str) -> bool:
    """Whether it is a folder that transformers wrote, or a name on the Hub: an owner's and the model's."""
    if (Path(model) / "config.json").is_file():
        return not (Path(model) / SETTINGS).is_file()
    return model.count("/") == 1 and not model.startswith((".", "/")) and not Path(model).exists()


def load_stock(source: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """A stock decoder in eval mode, from a folder that transformers wrote or a name on the Hub; nothing reduces it.

    Args:
        source: folder or name.
        dtype: of the weights; as they were saved if not given.
        device: where the model goes; the CPU if not given.

    Raises:
        ValueError: if there is no such model, or it is none that reads pictures and writes.
    """
    from transformers import AutoModelForImageTextToText

    if (Path(source) / "config.json").is_file():
        kind = read_config(Path(source), "save the model again").get("model_type")
        if kind in _ENCODERS:
            raise ValueError(
                f"{source} is a {kind} as transformers saved it, without the image transform of pumer: turn it into a "
                f"model folder with `pumer convert {source} FOLDER`"
            )
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("Model type should be one of")[0].strip().rstrip(".")
        raise ValueError(
            f"{source} cannot be read as a model that answers questions about images: {reason}. `pumer list` names "
            "the models that can be reduced"
        ) from None
    return model.to(device or "cpu").eval()


def saved_reducer(path: str | Path) -> Reducer | None:
    """The reducer that a folder was saved with; None if nothing reduced the model. Raises ValueError like `load`."""
    path = Path(path)
    return _read_settings(_settings(path), path / SETTINGS)


def _settings(path: Path) -> dict[str, Any]:
    return read_json(
        path / SETTINGS,
        "pumer.save writes it; for published checkpoints use pumer.load_official, for other folders from_pretrained "
        "and pumer.apply",
    )


def load_parts(model: Any, path: Path) -> None:
    """Give a learned reducer in force the weights that `save` wrote; raises ValueError if they are not its own."""
    patch = active(model)
    if patch is None or patch.parts is None:
        return
    if not (path / LEARNED).is_file():
        raise ValueError(
            f"{path} lacks {LEARNED}, the weights of its reducer {patch.reducer.name}: save the model again"
        )
    try:
        patch.parts.load_state_dict(load_file(path / LEARNED))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path / LEARNED} does not fit the reducer, save the model again: {error}") from error


def model_class(name: str) -> Any:
    """The model class of that name, ours or transformers'; raises ValueError if there is none."""
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        path = next((adapter.modules[name] for adapter in adapters() if name in adapter.modules), None)
        kind = None if path is None else getattr(importlib.import_module(path), name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        names = {name for adapter in adapters() for name in adapter.classes}
        raise ValueError(f"neither transformers nor pumer has a model class {name!r}.{did_you_mean(name, names)}")
    return kind


def class_in(config: dict[str, Any], where: Path) -> Any:
    """The model class named in the `architectures` of the config.json in a folder."""
    names = config.get("architectures")
    try:
        (name,) = names if isinstance(names, list) else (None,)
        return model_class(str(name))
    except ValueError:
        raise ValueError(
            f"config.json in {where} names the model class {names!r}, which neither transformers nor pumer has: read "
            "it with its own class, then call pumer.apply"
        ) from None


def _read_settings(settings: dict[str, Any], file: Path) -> Reducer | None:
    version = settings.get("format")
    if type(version) is not int or version < 1:  # JSON's true is an int to isinstance
        raise ValueError(f"{file} is damaged, its format is {version!r}: save the model again")
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by pumer {settings.get('pumer')}; this is pumer {__version__}, "
            f"which reads format {FORMAT}: upgrade pumer"
        )
    needed = {field.name for field in fields(_Saved) if field.default is MISSING}
    names = sorted(needed | {"renumber"} & set(settings))
    if sorted(settings) != names:
        raise ValueError(f"{file} should have the entries {names}, not {sorted(settings)}")
    check_settings(_Saved, settings, str(file))
    if settings["reducer"] is None:
        return None
    try:
        return from_dict(settings["reducer"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the reducer in {file} cannot be made: {error}") from error
