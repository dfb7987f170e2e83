"""Saving reduced models: `pumer.save`, and the model's own `save_pretrained` and `push_to_hub`.

`apply` wraps the latter two on the instance, so that they also write `pumer.json` and the model
card.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from pumer._files import new_folder
from pumer.adapters import supported, unwrapped
from pumer.adapters.active import active
from pumer.adapters.base import Patch
from pumer.adapters.rebind import METHODS
from pumer.hub.card import write_card
from pumer.hub.reduction import trained_parts, without_parts, write_reduction


def save(model: Any, path: str | Path, **arguments: Any) -> None:
    """Save a model with its active reducer: `save_pretrained`, `pumer.json` and a model card.

    The folder is written completely or not at all. Unreduced models can be saved too, and PEFT
    models, whose adapter is saved.

    Args:
        model: any Hugging Face model.
        path: a folder that does not exist yet, or is empty.
        arguments: of `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: if the folder is not empty, or the model is not a Hugging Face model.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.ToMe(r=16))
        >>> pumer.save(model, "my-model")
        >>> pumer.active(pumer.load("my-model")).reducer.r
        16
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{type(model).__name__} is not a Hugging Face model: save the one inside it"
        )
    patch = active(model)
    state = arguments.pop("state_dict", None)
    parts = trained_parts(patch, state)
    if parts:  # in a separate file, so that `from_pretrained` still reads the folder
        state = without_parts(model.state_dict() if state is None else state)
    if state is not None:
        arguments["state_dict"] = state
    with new_folder(path) as folder:
        model.save_pretrained(folder, **arguments)
        write_beside(folder, model, patch, parts)


def follow(model: nn.Module, patch: Patch) -> None:
    """Patch a reduced model, and its wrappers, to save the reducer too."""
    for module in unwrapped(model):
        if isinstance(module, PushToHubMixin) and not _follows(module):
            patch.wrap(module, "save_pretrained", _save_pretrained, patch)
            patch.wrap(module, "_upload_modified_files", _upload, patch)


def _follows(module: nn.Module) -> bool:
    methods = vars(module).get(METHODS, {}).values()
    return any(method.function is _save_pretrained for method in methods)


def _save_pretrained(
    module: nn.Module, stock: Callable[..., Any], patch: Patch, *args: Any, **kwargs: Any
) -> Any:
    """Wraps `save_pretrained` of transformers and PEFT: adds pumer's files.

    The weights include those of a learned reducer, because the Trainer resumes from them.
    """
    call = inspect.signature(stock).bind(*args, **kwargs).arguments
    call = {**call.pop("kwargs", {}), **call}
    # Before saving, which empties the state dict.
    parts = trained_parts(patch, call.get("state_dict"))
    result = stock(*args, **kwargs)
    on_this_rank = getattr(module, "should_save_on_this_rank", bool)
    if on_this_rank(call.get("is_main_process", True)):
        write_beside(Path(call["save_directory"]), module, patch, parts)
    return result


def _upload(
    module: nn.Module,
    stock: Callable[..., Any],
    patch: Patch,
    working_dir: str | Path,
    repo_id: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wraps `_upload_modified_files` of transformers' PushToHubMixin: adds pumer's files first.

    At that point `push_to_hub` has already written the card, the Hub's or an empty one.
    """
    write_beside(Path(working_dir), module, patch, trained_parts(patch), repo_id)
    return stock(working_dir, repo_id, *args, **kwargs)


def write_beside(
    folder: Path,
    model: nn.Module,
    patch: Patch | None,
    parts: Mapping[str, Tensor],
    name: str | None = None,
) -> None:
    """Write pumer's files beside a model's own.

    Args:
        folder: of the model, already written.
        model: with or without a wrapper.
        patch: of the model; None for an unreduced one.
        parts: weights of a learned reducer, see `trained_parts`.
        name: of the model on the Hub, if known.
    """
    if not folder.is_dir():  # transformers only logs an error for such a path
        return
    write_reduction(folder, patch, parts)
    if patch is not None:
        write_card(folder, supported(model), patch.reducer, name)
