"""Our own folders: what transformers writes, and `pumer.json` with the reduction in force."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from pumer._suggest import did_you_mean
from pumer.adapters.base import adapters
from pumer.api import active, apply
from pumer.hub.files import read_config, read_json, some
from pumer.hub.reduction import LEARNED, SETTINGS, is_part, load_parts, read_settings, reducer_in
from pumer.hub.sources import ADAPTER, CONFIG, Source, find_source, is_hub_name, split_hub


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> Any:
    """Read a saved model, from a folder or the Hub: in eval mode, with the same reduction in force.

    What `save` wrote, or a reduced model's own `save_pretrained` or `push_to_hub`. A folder of
    PEFT's gives a PeftModel: its base model, the adapter, then the reduction.

    Args:
        path: the folder, the name of a model that comes with the package (`pumer list`), or an
            owner's and a model's name on the Hub.
        dtype: of the weights; as they were saved if not given.
        device: where the model goes; the CPU if neither this nor `device_map` is given.
        arguments: of `from_pretrained`: `revision`, `token`, `cache_dir` and the like, by which
            pumer's own files are fetched too, and `device_map`, `quantization_config`,
            `attn_implementation` ...

    Raises:
        ValueError: if there is no such model, or a file is missing or damaged or was written by a
            newer pumer, or if `from_pretrained` does not take an argument.
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
        names = ("attention", "trim", "renumber")
        apply(model, reducer, **{name: settings[name] for name in names if name in settings})
        load_parts(active(model), source.folder)
    return model


def _read_model(source: Source, arguments: dict[str, Any]) -> Any:
    """A model of transformers or ours, every weight of which has to be there."""
    config = read_config(source.folder, "save the model again")
    cls = class_in(config, source.folder)
    try:
        with _quiet():  # what does not fit is said below
            model, info = cls.from_pretrained(
                source.name, weights_only=True, output_loading_info=True, **source.hub, **arguments
            )
    except ImportError:  # of what an argument needs, which it names
        raise
    except (
        Exception
    ) as error:  # whatever safetensors, torch and transformers make of a damaged file
        options = [name for name, value in arguments.items() if value and name != "dtype"]
        mend = f", or leave out {' and '.join(options)}" if options else ""
        raise ValueError(
            f"the model in {source.name} cannot be read, save it again{mend}: {error}"
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {source.name} lack {some(info['missing_keys'])}, which the "
            f"{cls.__name__} of its config.json has: restore its config.json, or save the model "
            "again"
        )
    # What a learned reducer has trained stays among the weights that the Trainer goes on from.
    unexpected = [name for name in info["unexpected_keys"] if not is_part(name)]
    if unexpected:
        raise ValueError(
            f"the weights in {source.name} have {some(unexpected)}, which the {cls.__name__} of "
            "its config.json has not: restore its config.json, or save the model again"
        )
    return model


def _read_adapter(source: Source, hub: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """A model of PEFT: the base model that an adapter names, with the adapter; neither is
    trained."""
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
    except Exception as error:  # whatever PEFT makes of a damaged file
        raise ValueError(
            f"the adapter in {source.name} cannot be put on {base.name}, save it again: {error}"
        ) from error


def base_of(source: Source, files: Sequence[str], hub: Mapping[str, Any]) -> Source:
    """The base model that PEFT's adapter in `source` names.

    Args:
        source: of the adapter.
        files: of the base model, to be fetched.
        hub: how those of the adapter were found.

    Raises:
        ValueError: if it names none, or there is none of that name.
    """
    config = read_json(source.folder / ADAPTER, "save the model again")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{ADAPTER} in {source.name} names no base model: set its base_model_name_or_path"
        )
    # The base is in a repository of its own, with revisions of its own.
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
    """Without the warnings of transformers."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


_ENCODERS = ("vilt", "meter")
"""Model types that choose from labels, and that no processor of transformers alone is enough
for."""


def is_stock(model: str, **hub: Any) -> bool:
    """Whether it is a folder or a name on the Hub without pumer's settings: as transformers writes
    models."""
    if (Path(model) / CONFIG).is_file():
        return not (Path(model) / SETTINGS).is_file()
    if not is_hub_name(model):
        return False
    try:
        return not find_source(model, (SETTINGS,), **hub).has(SETTINGS)
    except ValueError:  # transformers says what is the matter when it reads the model
        return True


def load_stock(
    source: str, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Any:
    """A stock decoder in eval mode, from a folder that transformers wrote or a name on the Hub;
    nothing reduces it.

    Args:
        source: folder or name.
        dtype: of the weights; as they were saved if not given.
        device: where the model goes; the CPU if not given.

    Raises:
        ValueError: if there is no such model, or it is none that reads images and writes.
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
    """The model class of that name, ours or transformers'; raises ValueError if there is none."""
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
    """The model class named in the `architectures` of the config.json in a folder."""
    names = config.get("architectures")
    try:
        (name,) = names if isinstance(names, list) else (None,)
        return model_class(str(name))
    except ValueError:
        raise ValueError(
            f"config.json in {where} names the model class {names!r}, which neither transformers "
            "nor pumer has: read it with its own class, then call pumer.apply"
        ) from None
