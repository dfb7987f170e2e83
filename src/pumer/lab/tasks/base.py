"""What a task is: examples, targets, a metric with its interval, and a prediction file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumer._suggest import some
from pumer.lab.data.images import (
    BrokenImageError,
    ImageSource,
    ImageTransform,
    open_image,
    pad_images,
)
from pumer.lab.data.text import TextTransform

Blind = Literal["text", "image"] | None
"""The only input a model is shown; both if None. See `Collator`."""
_NO_IMAGE = Image.new("RGB", (32, 32), (127, 127, 127))
NO_TEXT = "a picture"
"""Replaces a hidden text."""


@dataclass(frozen=True)
class Example:
    """One thing to predict.

    `images` are read and decoded only when collated. `target` is None without a label; else a class
    index (loss kind "class"), a dict with the scores of some classes ("soft"; by word where the
    task has no labels), or the index of the matching text among `text` and `negatives` ("rank").
    Examples of one `cluster`, usually an image, are not independent: the bootstrap resamples them
    together. `meta` holds what else the task's metric needs. `negatives` are texts that do not
    match the images.
    """

    id: int | str
    text: str
    images: Sequence[ImageSource]
    target: Any
    cluster: int | str
    meta: Mapping[str, Any] = field(default_factory=dict)
    negatives: tuple[str, ...] = ()


class Task(ABC):
    """A benchmark: a frozen dataclass whose fields say where the data is.

    A prediction is what `decode` returns for one example, by default a label. Metrics are in
    percent, rounded to two decimals. Methods that take predictions by example id raise ValueError
    for missing or unknown ids, and those that score raise it for examples without labels.
    """

    name: ClassVar[str]
    loss_kind: ClassVar[Literal["soft", "class", "rank", "none"]]
    """"soft": binary cross-entropy against the scores of all labels. "class": cross-entropy.
    "rank": cross-entropy over the scores of an example's texts. "none": nothing is learned or
    scored."""
    image_count: ClassVar[int] = 1
    """How many images an example has."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """The meaning of a model's outputs, in order."""

    @abstractmethod
    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, with random access; raises ValueError for missing or wrong
        files."""

    @abstractmethod
    def score(self, prediction: Any, example: Example) -> float:
        """The score of one prediction, from 0 to 1."""

    @abstractmethod
    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write predictions by example id in the format of the task's official evaluator,
        atomically."""

    def metric(
        self, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> dict[str, float]:
        """`accuracy` with its 95 % interval `accuracy_low` .. `accuracy_high`, in percent, and more
        by task.

        `predictions` are by example id; `examples` may be part of a split.
        """
        # Read once, because examples may be generated, and without images, which no score needs.
        examples = [replace(example, images=()) for example in examples]
        check_ids(predictions, examples)
        scores = [self.score(predictions[example.id], example) for example in examples]
        mean = sum(scores) / len(scores)
        low, high = bootstrap_interval(scores, [example.cluster for example in examples])
        accuracy = {"accuracy": mean, "accuracy_low": low, "accuracy_high": high}
        accuracy = {name: round(100 * value, 2) for name, value in accuracy.items()}
        return accuracy | self.details(scores, examples)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """What the task reports besides the accuracy, in percent."""
        return {}

    def answer_scores(self, example: Example) -> Mapping[Any, float]:
        """The score of every answer to an example that scores above 0."""
        return example.target if isinstance(example.target, Mapping) else {example.target: 1.0}

    def decode(self, logits: Tensor) -> list[Any]:
        """Predictions of a batch of logits [B, labels]: the label with the highest logit.

        Raises:
            ValueError: if there are not as many outputs as labels.
        """
        if logits.shape[-1] != len(self.labels):
            raise ValueError(
                f"the model has {logits.shape[-1]} outputs, the task {len(self.labels)} labels; "
                "give the task the labels that the model was trained on."
            )
        return [self.labels[index] for index in logits.argmax(-1).tolist()]

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Targets of a batch for the loss: float32 [B, labels] ("soft") or int64 [B] (other
        kinds)."""
        if self.loss_kind != "soft":
            return torch.tensor(targets, dtype=torch.int64)
        scores = torch.zeros(len(targets), len(self.labels))
        for row, target in zip(scores, targets, strict=True):
            for index, score in target.items():
                row[index] = score
        return scores


@dataclass(frozen=True)
class Collator:
    """Batch a task's examples: the data collator of transformers' Trainer.

    Returns the tokenizer's `input_ids` and other tensors [B, T], `pixel_values` [B, 3, H, W],
    `pixel_mask` [B, H, W] and, where every example has a target, `labels`; also the tensors of
    `extra_targets`. For tasks with several images B is followed by an axis of that size. Examples
    with negatives, of which each has equally many, give K texts each, the matching one first: [B *
    K, T]. Their images are not repeated, and K is the int `texts_per_image`.

    `blind` hides one of the inputs, for a baseline: with "text" every image is the same grey
    square, with "image" every text is "a picture". Some answers are likely whatever the image
    shows, and a model should be judged by what it gains over them. `order` holds the index of the
    model's output for every label of the task, None if they are in the same order; see
    `labels.label_order`.

    Raises:
        BrokenImageError: for unreadable images.
        ValueError: for empty texts, and for `blind` "image" where texts are the candidates.
    """

    task: Task
    text: TextTransform
    image: ImageTransform
    blind: Blind = None
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.blind == "image" and self.task.loss_kind == "rank":
            raise ValueError(
                f"blind: of equal texts {self.task.name} has none to choose; hide its images, "
                "which is blind text"
            )

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self.texts(examples) | self.pixels(examples)
        targets = [example.target for example in examples]
        if None not in targets:
            batch["labels"] = self.task.encode_targets(targets)
        return batch | extra_targets(examples)

    def texts(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The tokenizer's tensors, and `texts_per_image` if there are several."""
        texts = [text for example in examples for text in (example.text, *example.negatives)]
        each = len(texts) // len(examples)
        assert all(len(example.negatives) == each - 1 for example in examples)
        if self.blind == "image":
            texts = [NO_TEXT] * len(texts)
        tokens: dict[str, Any] = self.text(
            texts, [example.id for example in examples for _ in range(each)]
        )
        return tokens | ({"texts_per_image": each} if each > 1 else {})

    def pixels(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`pixel_values` and `pixel_mask`."""
        padded = dict(
            zip(("pixel_values", "pixel_mask"), pad_images(self.load_images(examples)), strict=True)
        )
        count = self.task.image_count
        return (
            {name: x.unflatten(0, (-1, count)) for name, x in padded.items()}
            if count > 1
            else padded
        )

    def in_task_order(self, logits: Tensor) -> Tensor:
        """A model's outputs [..., labels] in the order of the task's labels."""
        return logits if self.order is None else logits[..., list(self.order)]

    def load_images(self, examples: Sequence[Example]) -> list[Tensor]:
        """The transformed images of all examples, flat."""
        return [
            self.image(self._open(image, example))
            for example in examples
            for image in example.images
        ]

    def _open(self, image: ImageSource, example: Example) -> Image.Image:
        if self.blind == "text":
            return _NO_IMAGE
        try:
            return open_image(image, f"the image of example {example.id}")
        except BrokenImageError as error:
            if not hasattr(self.task, "skip"):
                raise
            raise BrokenImageError(
                f'{error} To leave out all that are broken set the task\'s skip to "broken"; '
                "`pumer data check` with --decode true names them."
            ) from error


def extra_targets(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Additional training targets from the examples' `meta`, where all of them have them.

    `patch_labels` [B,P,7] are dense targets, `teacher_logits` [B, labels] a teacher's logits.
    """
    return {
        name: torch.stack([example.meta[name] for example in examples])
        for name in ("patch_labels", "teacher_logits")
        if all(name in example.meta for example in examples)
    }


def last_argmax(scores: Tensor) -> Tensor:
    """Index of the highest score in every row of [B, K], the last one if several are equal: int64
    [B]."""
    return scores.shape[-1] - 1 - scores.flip(-1).argmax(-1)


def check_ids(predictions: Mapping[Any, Any], examples: Sequence[Example]) -> list[Any]:
    """The ids of the examples, in order.

    Raises:
        ValueError: unless there is exactly one prediction per example, and at least one example.
    """
    ids = [example.id for example in examples]
    if not ids:
        raise ValueError("there are no examples; check the split.")
    missing = [key for key in ids if key not in predictions]
    unknown = sorted(predictions.keys() - set(ids), key=str)
    if missing:
        raise ValueError(
            f"{count_of(missing, len(ids), 'examples')} have no prediction; predict them too."
        )
    if unknown:
        raise ValueError(
            f"{count_of(unknown, len(predictions), 'predictions')} are for no example; is it the "
            "right split?"
        )
    return ids


def check_labels(predictions: Mapping[Any, Any], labels: Sequence[str]) -> None:
    """Raise ValueError unless every prediction is one of the labels."""
    unknown_names = [name for name, label in predictions.items() if label not in labels]
    if unknown_names:
        raise ValueError(
            f"{count_of(unknown_names, len(predictions), 'predictions')} are none of "
            f"{', '.join(labels)}."
        )


def label_score(prediction: str, example: Example, labels: Sequence[str]) -> float:
    """1 for the label of an example, else 0; raises ValueError for an example without one."""
    if example.target is None:
        raise ValueError(f"{example.id} has no label; score a labelled split.")
    return float(prediction == labels[example.target])


def count_of(ids: Sequence[Any], total: int, what: str) -> str:
    """How many of how many, and which, naming at most five.

    >>> count_of([12, 14, 15], 8, "examples")
    '3 of 8 examples (12, 14, 15)'
    """
    return f"{len(ids)} of {total} {what} ({some(ids, 5)})"


_RESAMPLES = 1000
_DRAWS = 2**20


def bootstrap_interval(scores: Sequence[float], clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % percentile interval of the mean score, resampling whole clusters; deterministic.

    Answers about the same image are not independent, so resampling single questions would give
    intervals that are too narrow. To compare two models use the differences of their scores: that
    interval is narrower than either model's. Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993.

    >>> bootstrap_interval([1.0, 1.0, 1.0], ["a", "b", "b"])
    (1.0, 1.0)
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[name] for name in clusters])
    sums, counts = np.bincount(index, weights=np.asarray(scores, dtype=float)), np.bincount(index)
    generator = np.random.default_rng(0)
    means = []
    remaining = _RESAMPLES
    while remaining:  # as many resamples at a time as fit into a few megabytes
        rows = min(remaining, max(1, _DRAWS // len(names)))
        drawn = generator.integers(len(names), size=(rows, len(names)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
        remaining -= rows
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
