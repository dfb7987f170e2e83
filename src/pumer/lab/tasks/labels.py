"""Which of a model's outputs stands for which label of a task, and whether the two fit at all."""

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
    """The names of a model's outputs, in their order.

    Those of `id2label`; where it has transformers' LABEL_0, LABEL_1, ... and `label2id` has names,
    of that one.
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
    """Whether the names are those that transformers gives where nobody gave any."""
    return all(_UNNAMED.fullmatch(name) for name in names)


def same_names(names: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether a model's names are a task's labels, in any order and case."""
    return sorted(map(str.casefold, names)) == sorted(map(str.casefold, labels))


def label_order(config: Any, task: Task) -> tuple[int, ...] | None:
    """For every label of a task the number of the model's output that stands for it; None if in
    order.

    Labels are matched by name, whatever their case. A model whose labels are LABEL_0, LABEL_1, ...
    or 0, 1, ... is taken at its numbers, which a warning says.

    Raises:
        ValueError: for other names, and for another number of outputs.
    """
    names, labels = label_names(config), list(task.labels)
    if names == labels:
        return None
    if same_names(names, labels):
        position = {name: index for index, name in enumerate(names)}
        if not set(labels) <= set(position):  # the same words in another case
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
    """Raise ValueError for a model whose head cannot do a task; it is one that chooses from
    labels."""
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
        # A pair of images is what the classifier of images and text is for.
        offered = heads if task.image_count > 1 or len(heads) == 1 else heads[:2]
        classes = " or ".join(f"Vilt{head}" for head in offered)
        raise ValueError(
            f"{class_name} does not fit the task {task.name}, which {needs}: take a {classes} (or "
            "Meter...); a training gets one with --model.kind"
        )
    if not ranks and is_unnamed(task.labels):
        raise ValueError(
            f"the model's config.json names no answers ({some(task.labels, _SHOWN)}): set "
            "its id2label to the answers that the head was trained on, or give the task its labels"
        )
