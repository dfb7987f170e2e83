"""Published checkpoints: of PuMer, of the original ViLT and METER, and of transformers' ViLT."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pumer._files import new_folder
from pumer._suggest import some
from pumer.api import active, apply
from pumer.hub.files import (
    find_answers,
    read_answers,
    read_config,
    read_lightning,
    read_weights,
    write_answers,
)
from pumer.hub.folders import class_in, model_class
from pumer.hub.reduction import SETTINGS
from pumer.models.published import OURS, check_labels, check_support, predictors, set_label_names
from pumer.reducers import PuMer

_FAMILIES = ("vilt", "meter")
_HINTS = {
    "pos_embed is": " (give the grid of position embeddings as pos_grid in config.json)",
    "positional_embedding is": (
        " (image_size in config.json is that of the weights; give another one to load_official)"
    ),
}
_STOCK = "encoder.layer.0.attention.attention.query.weight"


@dataclass(frozen=True)
class Official:
    """A loaded checkpoint, and what was noticed while loading.

    Args:
        model: in eval mode, reduced as the checkpoint says.
        origin: "pumer", "original" (of ViLT's or METER's authors) or "transformers".
        answers: whether the labels of question answering have names.
        left_out: weights that the model does not use.
        new: weights that were initialized, because the model got a new head.
        unknown: unknown settings.
    """

    model: Any
    origin: str
    answers: bool = False
    left_out: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def load_official(
    source: str | Path,
    image_size: int | None = None,
    *,
    answers: str | Path | None = None,
    kind: str | None = None,
) -> Any:
    """Load a published ViLT or METER checkpoint, with its reducer active if it has one.

    The names of the weights tell three origins apart:

    - PuMer: a folder with `config.json` and `model.safetensors` (or `pytorch_model.bin`). For the
      published results pad text to the length of training, because the published code counts padded
      text. METER models have `update="sequential"`; without reduction, models still use the
      published softmax.
    - the original ViLT and METER: a Lightning `.ckpt` file, unreduced; METER has
      `update="parallel"`.
    - transformers' ViLT and BridgeTower: a folder for `from_pretrained`, unreduced.

    The head determines the task and the model class; visual entailment and METER have classes in
    pumer. Inputs have transformers' names. A warning lists unused weights, such as ViLT's head for
    image-text matching.

    Args:
        source: the folder or file. Sizes are read from the weights; those that weights do not show,
            such as `pos_grid` ([12, 12]), may be set in its `config.json`.
        image_size: another side of the images in pixels; METER's position embeddings are resized.
        answers: file with the answers of question answering in order: PuMer's
            `vqa2_label2ans.json` or `vqa2_ans2label.json`, or ViLT's `vqa_dict.json`; default: the
            one beside the weights.
        kind: another class of the family, which then gets a new head, to fine-tune from
            pretraining.

    Raises:
        ValueError: if a file is missing, damaged or contains pickled code, if weights are missing
            or have wrong shapes, or for learned pruning with unsupported predictors.

    Example:
        >>> pumer.save_official(pumer.load("scenes-vilt"), "official")
        >>> model = pumer.load_official("official")
    """
    read = read_official(source, image_size, answers=answers, kind=kind)
    if read.unknown:
        _warn(
            f"config.json in {source} has settings that are unknown and ignored: "
            f"{', '.join(read.unknown)}"
        )
    if read.left_out:
        _warn(f"unused weights in {source}: {some(sorted(read.left_out))}")
    return read.model


def read_official(
    source: str | Path,
    image_size: int | None = None,
    *,
    answers: str | Path | None = None,
    kind: str | None = None,
) -> Official:
    """Like `load_official`, with an `Official` instead of warnings."""
    answer_list = None if answers is None else read_answers(Path(answers))
    read = _read(Path(source), image_size, answer_list, kind)
    if answer_list and not read.answers:
        raise ValueError(
            f"answers are for question answering, {source} is a {type(read.model).__name__}"
        )
    return read


def _read(
    source: Path, image_size: int | None, answers: list[str] | None, class_name: str | None
) -> Official:
    if source.suffix == ".ckpt":
        from pumer.models.lightning import settings_of, to_published

        state, made_with = read_lightning(source)
        # The originals have their own order of answers: use no other vocabulary beside the file.
        beside = answers or find_answers(source.parent, ["vqa_dict.json"])
        return _build(
            to_published(state),
            settings_of(made_with),
            source,
            "original",
            image_size,
            beside,
            class_name,
        )
    if source.is_file():
        raise ValueError(
            f"{source} is no .ckpt file: give a checkpoint's folder, or an original .ckpt file"
        )
    if class_name is not None:
        model_class(class_name)
    if (source / SETTINGS).exists():
        raise ValueError(f"{source} was written by pumer.save: read it with pumer.load")
    settings = read_config(
        source, "a published checkpoint has one, unless it is an original .ckpt file"
    )
    if settings.get("model_type") == "bridgetower":
        return _read_stock(settings, source, image_size, answers, class_name)
    state = read_weights(source)
    if any(name.endswith(_STOCK) for name in state):
        return _read_stock(settings, source, image_size, answers, class_name)
    return _build(
        state, settings, source, "pumer", image_size, answers or find_answers(source), class_name
    )


def _build(
    state: Mapping[str, Tensor],
    settings: dict[str, Any],
    source: Path,
    origin: str,
    image_size: int | None,
    answers: list[str] | None,
    class_name: str | None,
) -> Official:
    published = _family(state, source)
    layout = published.LAYOUT
    check_support(settings)
    head_found = layout.find_head(state)
    head = layout.head_of(class_name) if class_name else head_found
    answers = answers if head == "vqa_classifier" else None
    fitted = layout.with_head(state, head)
    config = published.model_config(settings, fitted, head, answers)
    cls = model_class(layout.classes[head])
    with torch.device("meta"):
        expected = cls(config).state_dict()
    needed = {
        name: x
        for name, x in layout.from_ours(expected, head).items()
        if name != layout.position_ids
    }
    new = (
        set()
        if head == head_found
        else {name for name in needed if name.startswith(f"{head}.")} - set(fitted)
    )
    _check_weights({name: x for name, x in needed.items() if name not in new}, fitted, source)
    if image_size is not None:
        fitted = published.resize(fitted, config, image_size)
    converted = layout.to_ours(fitted)
    model = cls.from_pretrained(
        None,
        config=config,
        state_dict={name: converted[name] for name in expected if name in converted},
        dtype=torch.float32,
    )
    published.finish(model, settings)
    model.eval()
    if reducer := published.reducer(settings):
        apply(model, reducer)
    learned = predictors(state, published.pruned_layer)
    if parts := _parts(model):
        _check_weights(parts.state_dict(), learned, source)
        parts.load_state_dict(learned)
    return Official(
        model,
        origin,
        answers=answers is not None,
        left_out=tuple(
            sorted(
                name
                for name in set(state) - set(needed) - {layout.position_ids}
                if not (parts and "token_pruner." in name)
            )
        ),
        new=tuple(sorted(new)),
        unknown=tuple(published.unknown_settings(settings)) if origin == "pumer" else (),
    )


def _read_stock(
    settings: dict[str, Any],
    source: Path,
    image_size: int | None,
    answers: list[str] | None,
    class_name: str | None,
) -> Official:
    from pumer.models.vilt.published import resize

    if class_name is not None:
        raise ValueError(
            f"{source} is in transformers' own layout: {class_name}.from_pretrained gives it "
            "a new head"
        )
    cls = class_in(settings, source)
    try:
        model, info = cls.from_pretrained(
            source,
            dtype=torch.float32,
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(f"the model in {source} cannot be read: {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {source} do not fit, missing: {some(sorted(info['missing_keys']))}"
        )
    if image_size is not None and model.config.model_type != "vilt":
        raise ValueError(f"{source} takes images of its own size alone: leave image_size out")
    if image_size is not None:
        resize({}, model.config, image_size)
    if answers is not None:
        if len(answers) != model.config.num_labels:
            raise ValueError(
                f"the vocabulary has {len(answers)} answers, the model {model.config.num_labels}"
            )
        set_label_names(model.config, answers)
    named = set(model.config.id2label.values()) != {
        f"LABEL_{index}" for index in range(model.config.num_labels)
    }
    return Official(
        model, "transformers", answers=named, left_out=tuple(sorted(info["unexpected_keys"]))
    )


def save_official(model: Any, directory: str | Path) -> None:
    """Save a model in PuMer's published layout: `config.json`, `model.safetensors` and the answers.

    The folder is written completely or not at all; `load_official` loads the same model. A warning
    says if the published code would compute something else, because it ignores that the reducer is
    not `official`, or METER's order of updates.

    Args:
        model: a ViLT or METER model with one of the published heads, unreduced or reduced by PuMer.
        directory: a folder that does not exist yet, or is empty.

    Raises:
        ValueError: if the published layout does not support the model or its reducer, or the folder
            is not empty.

    Example:
        >>> model = pumer.load("scenes-vilt")
        >>> pumer.save_official(model, "official")  # in the layout of csarron/PuMer
    """
    from safetensors.torch import save_file

    name, patch = type(model).__name__, active(model)
    reducer = None if patch is None else patch.reducer
    if reducer is not None and not isinstance(reducer, PuMer):
        raise ValueError(
            f"the published layout does not support {reducer.name}: pumer.remove it, or use "
            "pumer.save"
        )
    family = next((family for family in _FAMILIES if name.lower().startswith(family)), None)
    if family is None:
        raise ValueError(f"the published layout does not support {name}, only ViLT and METER")
    published = _module(family)
    head = published.LAYOUT.head_of(name)
    check_labels(model.config, head)
    settings = published.settings_of(model, reducer)
    weights = published.LAYOUT.from_ours(model.state_dict(), head)
    if other := [name for name in OURS if name in settings]:
        _warn(
            f"the published code ignores {' and '.join(other)} in config.json, so its outputs "
            "differ from this model's"
        )
    with new_folder(directory) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # Cloned, because safetensors does not save weights that share memory.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        answers = list(model.config.id2label.values())
        if head == "vqa_classifier" and answers != [
            f"LABEL_{index}" for index in range(len(answers))
        ]:
            write_answers(folder, answers)


def _parts(model: Any) -> Any:
    patch = active(model)
    return None if patch is None else patch.parts


def _module(family: str) -> Any:
    return importlib.import_module(f"pumer.models.{family}.published")


def _family(state: Iterable[str], source: Path) -> Any:
    for family in _FAMILIES:
        if any(name.startswith(f"{family}.") for name in state):
            return _module(family)
    raise ValueError(
        f"the weights in {source} are neither ViLT's nor METER's: {some(sorted(state))}"
    )


def _check_weights(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path
) -> None:
    problems = []
    if missing := set(expected) - set(state):
        problems.append(f"missing: {some(sorted(missing))}")
    mismatched = [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if mismatched:
        problems.append(f"wrong shapes: {some(sorted(mismatched))}")
    if problems:
        hint = next(
            (hint for name, hint in _HINTS.items() if any(name in line for line in mismatched)), ""
        )
        raise ValueError(f"the weights in {source} do not fit, {'; '.join(problems)}{hint}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
