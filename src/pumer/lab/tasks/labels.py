"""Match a model's outputs to the labels of a task."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from pumer._suggest import some
from pumer.lab.tasks.base import Task

_LOG = logging.getLogger(__name__)
_SHOWN = 6
_UNNAMED = re.compile(r"LABEL_\d+")
_CLASSIFIERS = ("ForQuestionAnswering", "ForVisualEntailment", "ForImagesAndTextClassification")


def label_names(config: Any) -> list[str]:
    """The names of a model's outputs, in order.

    From `id2label`; if that holds transformers' defaults LABEL_0, LABEL_1, ... and `label2id` has
    names, from `label2id`.
    """
    id2label = {int(index): str(name) for index, name in config.id2label.items()}
    names = [id2label[index] for index in sorted(id2label)]
    if is_unnamed(names):
        label2id = {str(name): int(index) for name, index in (config.label2id or {}).items()}
        numbered = sorted(label2id, key=label2id.__getitem__)
        if len(numbered) == len(names) and sorted(label2id.values()) == list(range(len(names))):
            return numbered
    return names


def is_unnamed(names: Sequence[str]) -> bool:
    """Whether the names are transformers' defaults."""
    return all(_UNNAMED.fullmatch(name) for name in names)


def same_names(names: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether a model's names are the task's labels, ignoring order and case.

    >>> same_names(["No", "yes"], ["yes", "no"])
    True
    """
    return sorted(map(str.casefold, names)) == sorted(map(str.casefold, labels))


def label_order(config: Any, task: Task) -> tuple[int, ...] | None:
    """The index of the model's output for every label of the task; None if they are in the same
    order.

    Labels are matched by name, ignoring case. A model with labels LABEL_0, LABEL_1, ... or 0, 1,
    ... is matched by index, with a warning.

    Raises:
        ValueError: for other names, and for another number of outputs.
    """
    names, labels = label_names(config), list(task.labels)
    if names == labels:
        return None
    if same_names(names, labels):
        position = {name: index for index, name in enumerate(names)}
        if not set(labels) <= set(position):  # same words in another case
            position = {name.casefold(): index for name, index in position.items()}
            labels = [label.casefold() for label in labels]
        order = tuple(position[label] for label in labels)
        return None if order == tuple(range(len(order))) else order
    numbered = is_unnamed(names) or names == [str(index) for index in range(len(names))]
    if numbered and len(names) == len(labels):
        _LOG.warning(
            "the model's labels are %s: they are taken for %s, in this order; if it is another "
            "one, "
            "set id2label in the model's config.json",
            some(names, _SHOWN),
            some(labels, _SHOWN),
        )
        return None
    raise ValueError(
        f"the model's labels ({some(names, _SHOWN)}) are not those of the task {task.name} "
        f"({some(labels, _SHOWN)}): take a model that was trained on the task, or, if they mean "
        "the same, set id2label in its config.json to the task's words"
    )


def check_fit(model: Any, task: Task) -> None:
    """Raise ValueError if a model's classification head does not fit a task."""
    if task.loss_kind == "none":
        return
    class_name = type(model).__name__
    bases = [base.__name__ for base in type(model).__mro__]
    ranks = task.loss_kind == "rank"
    if ranks:
        heads: tuple[str, ...] = ("ForImageAndTextRetrieval",)
        needs = "ranks texts"
    elif task.image_count > 1:
        heads, needs = _CLASSIFIERS[2:], f"has {task.image_count} images per example"
    elif task.loss_kind == "soft":
        heads, needs = _CLASSIFIERS[:1], "asks questions with many answers"
    else:
        heads, needs = (
            _CLASSIFIERS,
            f"has one image per example and the labels {some(task.labels, _SHOWN)}",
        )
    suits = any(base.endswith(heads) for base in bases)
    if suits and class_name.endswith(_CLASSIFIERS[2]):
        suits = model.config.num_images == task.image_count
    if not suits:
        # Only the classifier of images and text takes a pair of images.
        offered = heads if task.image_count > 1 or len(heads) == 1 else heads[:2]
        classes = " or ".join(f"Vilt{head}" for head in offered)
        raise ValueError(
            f"{class_name} does not fit the task {task.name}, which {needs}: take a {classes} (or "
            "Meter..., BridgeTower...); a training gets one with --model.kind"
        )
    if not ranks and is_unnamed(task.labels):
        raise ValueError(
            f"the model's config.json names no answers ({some(task.labels, _SHOWN)}): set "
            "its id2label to the answers that the head was trained on, or give the task its labels"
        )
