"""The model a training starts from: new, pretrained, or pretrained with a new head."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import pumer
from pumer._options import Count
from pumer._shipped import SHIPPED, model_folder
from pumer.hub import load, load_official, model_class
from pumer.hub.reduction import LEARNED, load_parts
from pumer.lab.data.text import load_tokenizer
from pumer.lab.tasks import Task, VQAv2, build, get
from pumer.lab.tasks.labels import check_fit, label_names, same_names
from pumer.lab.tasks.prompts import is_generative, vocabulary
from pumer.lab.tasks.vqav2 import with_new_answers
from pumer.lab.train.configuration import check_config, new_model
from pumer.models import sizes
from pumer.models.bridgetower.init import init_bridgetower_from_vilt
from pumer.models.llava import new_llava, writing_tokenizer
from pumer.models.meter.init import init_meter_from_vilt
from pumer.models.vilt.init import init_local_attention
from pumer.models.vilt.resize import resize_patches

_LOG = logging.getLogger(__name__)
_MODALITIES = (
    "vilt.embeddings.token_type_embeddings.weight",
    "meter.modality_embeddings.weight",
    "bridgetower.token_type_embeddings.weight",
)
_FROM_VILT = {"meter": init_meter_from_vilt, "bridgetower": init_bridgetower_from_vilt}
"""Families whose text encoder is a RoBERTa, with their initialization."""


@dataclass
class ModelSettings:
    """Where the model comes from.

    Args:
        path: a model to start from: a folder of `pumer.save` or anything that `pumer.load_official`
            reads. Its tokenizer and image transform are used if they are in it.
        kind: the model class; by default that of `path`, or ViltForQuestionAnswering for a new
            model.
        config: settings of a new model's configuration; with `path`, those to change.
        start: a ViLT with blocks of the same width, to initialize the word embeddings and first
            blocks of a new METER, BridgeTower or LLaVA.
        tokenizer: folder or name of the tokenizer, or a shipped model that has it, if `path` does
            not.
        image_size: side of the images in pixels, to change that of the published checkpoint at
            `path`.
        patch_size: patch size in pixels, to change that of the ViLT at `path`.
        max_length: longest text in tokens; at most what the model supports.
    """

    path: str | None = None
    kind: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    tokenizer: str | None = None
    image_size: Count | None = None
    patch_size: Count | None = None
    max_length: Count = 40


def prepare(
    settings: ModelSettings, task: dict[str, Any], train_split: str = "train"
) -> tuple[PreTrainedModel, Any, Task]:
    """Model, tokenizer and task, with a new head where class or labels differ from the start's.

    Args:
        settings: of the model.
        task: `name` and settings.
        train_split: split in which new answers are counted.

    Raises:
        ValueError: for settings that do not fit each other.
    """
    if settings.path is None and settings.tokenizer is None:
        raise ValueError("a new model needs model.tokenizer, the folder of its tokenizer")
    named = settings.tokenizer or str(model_folder(str(settings.path)))
    shipped = SHIPPED / named
    tokenizer = load_tokenizer(shipped if shipped.is_dir() else named)
    if settings.path is None:
        net, the_task = _new(settings, task, train_split, tokenizer)
    else:
        net, the_task = _trained(settings, task, train_split)
    if not is_generative(net):
        check_fit(net, the_task)
    padding = getattr(net.config, "text_config", net.config).pad_token_id
    if net.config.model_type in _FROM_VILT and padding != tokenizer.pad_token_id:
        raise ValueError(  # RoBERTa derives positions from it
            f"the tokenizer pads with {tokenizer.pad_token_id}, the model's text encoder takes "
            f"{padding} for padding: give model.config.text_config.pad_token_id "
            f"{tokenizer.pad_token_id}"
        )
    return net, tokenizer, the_task


def _new(
    settings: ModelSettings, task: dict[str, Any], train_split: str, tokenizer: Any
) -> tuple[PreTrainedModel, Task]:
    """A new model and the task; the tokenizer of a generative model gets what it needs for that."""
    net_class = model_class(settings.kind or "ViltForQuestionAnswering")
    config = check_config(net_class.config_class, settings.config)
    the_task = _build(task, (), train_split)
    vilt = read_model(settings.start) if settings.start else None
    if net_class.__name__ == "LlavaForConditionalGeneration":
        return new_llava(
            net_class, config, writing_tokenizer(tokenizer, the_task.labels), vilt
        ), build(task)
    defaults = _image_names(net_class.config_class(), the_task)
    net = new_model(net_class, defaults | config | _label_names(the_task))
    if net.config.model_type == "vilt":
        init_local_attention(net)
    elif vilt is not None:
        _FROM_VILT[net.config.model_type](net, vilt)
    return net, the_task


def _trained(
    settings: ModelSettings, task: dict[str, Any], train_split: str
) -> tuple[PreTrainedModel, Task]:
    """A pretrained model, with a new head where needed, and the task."""
    # Ranking starts from the matching head of a published checkpoint, which the class of its
    # pretraining lacks.
    ranks = get(str(task.get("name"))).loss_kind == "rank"
    start = read_model(str(settings.path), settings.image_size, settings.kind if ranks else None)
    net_class = model_class(settings.kind) if settings.kind else type(start)
    if is_generative(start):
        if net_class is not type(start) or settings.config:
            raise ValueError(
                f"a {type(start).__name__} keeps its class and configuration: leave model.kind "
                "and model.config out"
            )
        return start, build(task)
    if net_class.config_class is not type(start.config):
        raise ValueError(
            f"model.kind {net_class.__name__} cannot start from a {type(start).__name__}: use a "
            "class of its family"
        )
    config = check_config(net_class.config_class, settings.config)
    labels = vocabulary(start)
    the_task = _build(task, labels if net_class is type(start) else (), train_split)
    same = net_class is type(start) and (
        the_task.loss_kind == "rank" or same_names(labels, the_task.labels)
    )
    net = start if same and not config else rebuild(start, net_class, the_task, config)
    if settings.patch_size and settings.patch_size != sizes.vision_of(net.config).patch_size:
        net = resize_patches(net, settings.patch_size)
    return net, the_task


def longest_text(net: PreTrainedModel, wanted: int) -> int:
    """Length in tokens that texts are cut to: at most the positions of a model that chooses its
    answers."""
    return wanted if is_generative(net) else min(wanted, sizes.longest_text(net.config))


def model_path(model: str) -> Path:
    """The folder of a model, or an original checkpoint's file; raises ValueError if there is
    neither."""
    return Path(model) if model.endswith(".ckpt") else model_folder(model)


def read_model(
    path: str, image_size: int | None = None, kind: str | None = None
) -> PreTrainedModel:
    """A model of `pumer.save` or a published checkpoint, unreduced, in float32.

    Args:
        path: its folder, or an original checkpoint's file.
        image_size: see `load_official`; only for published checkpoints.
        kind: see `load_official`; only for published checkpoints.

    Raises:
        ValueError: if there is no such model, or it cannot be read.
    """
    source = model_path(path)
    if (source / "pumer.json").is_file():
        if image_size:
            raise ValueError(
                f"model.image_size is for published checkpoints, {path} is one of pumer.save: "
                "leave it out"
            )
        return pumer.remove(load(source, dtype=torch.float32))
    return pumer.remove(load_official(source, image_size, kind=kind))


def start_parts(net: PreTrainedModel, path: str | None) -> None:
    """Load the trained parts of an active learned reducer from the model's start folder, if they
    fit."""
    patch = pumer.active(net)
    if path is None or patch is None or patch.parts is None:
        return
    folder = model_folder(path)
    if not (folder / LEARNED).is_file():
        return
    try:
        load_parts(pumer.active(net), folder)
    except ValueError:
        _LOG.warning(
            "the trained parts in %s are not those of this reducer: it starts with new ones", folder
        )


def rebuild(
    start: PreTrainedModel, net_class: Any, task: Task, changes: dict[str, Any]
) -> PreTrainedModel:
    """A model of another class, for other labels or with other settings, with all weights that fit.

    A head is kept if its shapes and, for a classifier, its labels stay the same; new weights are
    logged. With several images the token types of further images start as the last one of the
    start, as in ViLT, METER and BridgeTower.

    Args:
        start: the model whose weights are taken.
        net_class: the new class, of the same family.
        task: gives labels and number of images.
        changes: settings of the configuration, see `check_config`.

    Raises:
        ValueError: for settings that do not fit each other, and trunk weights of other shapes.
    """
    config = copy.deepcopy(start.config)
    keeps_labels = task.loss_kind == "rank" or same_names(label_names(config), task.labels)
    names = {} if keeps_labels else _label_names(task)
    _change(config, {**names, **_image_names(config, task), **changes})
    net = new_model(net_class, config)
    new = net.state_dict()
    old = {
        name: _more_rows(value, len(new[name])) if name in _MODALITIES else value
        for name, value in start.state_dict().items()
        if name in new
    }
    mismatched = {name for name, value in old.items() if value.shape != new[name].shape}
    trunk = f"{net.base_model_prefix}."
    if bad := [name for name in mismatched if name.startswith(trunk)]:
        raise ValueError(
            "weights at model.path have other shapes than the settings ask for: "
            f"{', '.join(sorted(bad))}"
        )
    reset_heads = {
        _head(name) for name in (set(new) - set(old)) | mismatched if not name.startswith(trunk)
    }
    if not keeps_labels:
        reset_heads.add("classifier")
    kept_weights = {name: value for name, value in old.items() if _head(name) not in reset_heads}
    net.load_state_dict(kept_weights, strict=False)
    if not changes:
        # The published dropout of text embeddings is set on the module; the configuration has no
        # setting for it.
        before = dict(start.named_modules())
        for name, module in net.named_modules():
            if isinstance(module, nn.Dropout) and name in before:
                module.p = before[name].p
    fresh = sorted({name.rpartition(".")[0] for name in set(new) - set(kept_weights)})
    if fresh:
        _LOG.warning("weights that start anew: %s", ", ".join(fresh))
    return net


def _change(config: Any, changes: Mapping[str, Any]) -> None:
    """Change settings of a configuration in place, sub-configurations included."""
    for name, value in changes.items():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and isinstance(value, Mapping):
            _change(part, value)
        else:
            setattr(config, name, value)


def _head(name: str) -> str:
    return name.partition(".")[0]


def _more_rows(table: Tensor, rows: int) -> Tensor:
    """The table, its last row repeated up to so many rows."""
    return torch.cat([table, table[-1:].expand(max(rows - len(table), 0), -1)])


def _build(task: dict[str, Any], labels: Sequence[str], train_split: str) -> Task:
    """The task; new answers are counted in the annotations, if the model has none or `answers` is
    "data"."""
    anew = task.get("answers") == "data"
    if anew and task.get("labels"):
        raise ValueError(
            "task.labels are the answers, and task.answers data counts them: give one of the two"
        )
    built = build(task, () if anew else labels)
    return (
        with_new_answers(built, train_split)
        if isinstance(built, VQAv2) and not built.labels
        else built
    )


def _image_names(config: Any, task: Task) -> dict[str, int]:
    """What the configuration says for a task with several images per example."""
    if task.image_count < 2:
        return {}
    names = {"num_images": task.image_count}
    types = getattr(config, "modality_type_vocab_size", None)
    if types is not None:
        names["modality_type_vocab_size"] = max(types, task.image_count + 1)
    return names


def _label_names(task: Task) -> dict[str, Any]:
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
    }
