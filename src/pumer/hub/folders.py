"""Load model folders: what transformers writes, and `pumer.json` with the active reducer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from pumer._suggest import did_you_mean, some
from pumer.adapters.base import OPTIONS, adapters
from pumer.api import active, apply
from pumer.hub.files import read_config, read_json
from pumer.hub.reduction import LEARNED, SETTINGS, is_part, load_parts, read_settings, reducer_in
from pumer.hub.sources import ADAPTER, CONFIG, Source, find_source, is_hub_name, split_hub


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> Any:
    """Load a saved model from a folder or the Hub, in eval mode, with its reducer active.

    Loads what `save`, or a reduced model's `save_pretrained` or `push_to_hub`, has written. A
    folder with a PEFT adapter gives a reduced PeftModel.

    Args:
        path: a folder, the name of a model in the package (`pumer list`), or OWNER/NAME on the Hub.
        dtype: of the weights; default: as saved.
        device: of the model; default: the CPU, unless `device_map` is given.
        arguments: of `from_pretrained`: `revision`, `token`, `cache_dir` and the like, also used
            for pumer's own files, and `device_map`, `quantization_config`, `attn_implementation`
            ...

    Raises:
        ValueError: if there is no such model, a file is missing, damaged or of a newer pumer, or
            `from_pretrained` does not accept an argument.

    Example:
        >>> model = pumer.load("scenes-vilt-pumer")  # or a folder, or a name on the Hub
        >>> pumer.active(model).reducer.name
        'pumer'
    """
    if device is not None and arguments.get("device_map") is not None:
        raise ValueError("device and device_map both say where the model goes: give one of them")
    hub, reading = split_hub(arguments)
    source = find_source(path, (SETTINGS, LEARNED, CONFIG, ADAPTER), **hub)
    settings = read_settings(source)
    reducer = reducer_in(settings, source.folder / SETTINGS)
    reading = {"trust_remote_code": False, "dtype": dtype} | reading
    if source.has(ADAPTER) and not source.has(CONFIG):
        model = _read_adapter(source, hub, reading)
    else:
        model = _read_model(source, reading)
    if device is not None:
        model.to(device)
    if reducer is not None:
        apply(model, reducer, **{name: settings[name] for name in OPTIONS if name in settings})
        load_parts(active(model), source.folder)
    return model


def _read_model(source: Source, arguments: dict[str, Any]) -> Any:
    """A model of transformers or pumer; all its weights must be in the file."""
    config = read_config(source.folder, "save the model again")
    cls = class_in(config, source.folder)
    try:
        with _quiet():  # mismatches are raised below
            model, info = cls.from_pretrained(
                source.name, weights_only=True, output_loading_info=True, **source.hub, **arguments
            )
    except ImportError:  # its message names the missing package
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        options = [name for name, value in arguments.items() if value and name != "dtype"]
        mend = f", or leave out {' and '.join(options)}" if options else ""
        raise ValueError(
            f"the model in {source.name} cannot be read, save it again{mend}: {error}"
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {source.name} lack {some(sorted(info['missing_keys']))}, which the "
            f"{cls.__name__} of its config.json has: restore its config.json, or save the model "
            "again"
        )
    # Checkpoints of the Trainer include the weights of a learned reducer.
    unexpected = [name for name in info["unexpected_keys"] if not is_part(name)]
    if unexpected:
        raise ValueError(
            f"the weights in {source.name} have {some(sorted(unexpected))}, which the "
            f"{cls.__name__} of its config.json has not: restore its config.json, or save the "
            "model again"
        )
    return model


def _read_adapter(source: Source, hub: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """A PeftModel in eval mode: an adapter, and the base model that it names."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"{source.name} holds an adapter of PEFT: install peft to load it"
        ) from None
    base = base_of(source, (CONFIG,), hub)
    model = _read_model(base, arguments)
    try:
        return PeftModel.from_pretrained(model, source.name, **source.hub).eval()
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(
            f"the adapter in {source.name} cannot be put on {base.name}, save it again: {error}"
        ) from error


def base_of(source: Source, files: Sequence[str], hub: Mapping[str, Any]) -> Source:
    """The base model that PEFT's adapter in `source` names.

    Args:
        source: of the adapter.
        files: of the base model, to fetch.
        hub: Hub arguments of the adapter.

    Raises:
        ValueError: if it names no base model, or there is none of that name.
    """
    config = read_json(source.folder / ADAPTER, "save the model again")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{ADAPTER} in {source.name} names no base model: set its base_model_name_or_path"
        )
    # The base model is in another repository, with its own revisions.
    how = {name: x for name, x in hub.items() if name not in ("revision", "subfolder")}
    if config.get("revision"):
        how["revision"] = config["revision"]
    try:
        return find_source(base, files, **how)
    except ValueError as error:
        raise ValueError(
            f"the base model of the adapter in {source.name} is missing: {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of transformers."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


_ENCODERS = ("vilt", "meter", "bridgetower")
"""Encoders, which need the image transform of a pumer folder besides a processor."""


def is_stock(model: str, **hub: Any) -> bool:
    """Whether a folder, or a name on the Hub, is a plain transformers model, without
    `pumer.json`."""
    if (Path(model) / CONFIG).is_file():
        return not (Path(model) / SETTINGS).is_file()
    if not is_hub_name(model):
        return False
    try:
        return not find_source(model, (SETTINGS,), **hub).has(SETTINGS)
    except ValueError:  # loading with transformers gives the better error
        return True


def load_stock(
    source: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Any:
    """Load a stock decoder, unreduced and in eval mode, from a transformers folder or the Hub.

    Args:
        source: folder or name.
        dtype: of the weights; default: as saved.
        device: of the model; default: the CPU.

    Raises:
        ValueError: if there is no such model, or it does not generate text from images.
    """
    from transformers import AutoModelForImageTextToText

    if (Path(source) / CONFIG).is_file():
        model_type = read_config(Path(source), "save the model again").get("model_type")
        if model_type in _ENCODERS:
            raise ValueError(
                f"{source} is a {model_type} as transformers saved it, without the image transform "
                f"of pumer: turn it into a model folder with `pumer convert {source} FOLDER`"
            )
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype or "auto", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("Model type should be one of")[0].strip().rstrip(".")
        raise ValueError(
            f"{source} cannot be read as a model that answers questions about images: {reason}. "
            "`pumer list` names the models that can be reduced"
        ) from None
    return model.to(device or "cpu").eval()


def model_class(name: str) -> Any:
    """The model class of that name, of transformers or pumer; raises ValueError without one."""
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        path = next(
            (adapter.modules[name] for adapter in adapters() if name in adapter.modules), None
        )
        cls = None if path is None else getattr(importlib.import_module(path), name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        names = {name for adapter in adapters() for name in adapter.classes}
        raise ValueError(
            f"neither transformers nor pumer has a model class {name!r}.{did_you_mean(name, names)}"
        )
    return cls


def class_in(config: dict[str, Any], where: Path) -> Any:
    """The model class named in the `architectures` of a config.json."""
    names = config.get("architectures")
    try:
        (name,) = names if isinstance(names, list) else (None,)
        return model_class(str(name))
    except ValueError:
        raise ValueError(
            f"config.json in {where} names the model class {names!r}, which neither transformers "
            "nor pumer has: read it with its own class, then call pumer.apply"
        ) from None
