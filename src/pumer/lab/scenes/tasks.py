"""Questions about generated images, made on the fly: the built-in benchmark and unlimited training
data.

`pumer data scenes` writes the same images in VQAv2's official files; the metric is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from pumer.lab.scenes import drawing as scene_data
from pumer.lab.scenes.backgrounds import photographs
from pumer.lab.scenes.drawing import (
    OBJECTS,
    check_style,
    draw_scenes,
    patch_offsets,
    patch_targets,
)
from pumer.lab.scenes.questions import ANSWERS, KINDS, SceneQuestion, ask, referent_targets
from pumer.lab.tasks.base import Example, Task
from pumer.lab.tasks.vqa_answers import write_answers

SEEDS = {"train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class Scenes(Task):
    """Scenes-VQA: images of 4 to 10 textured shapes with template questions, deterministic by
    seed.

    Args:
        questions: in a split.
        per_picture: questions about one image.
        image_size: side in pixels.
        patch_size: if given, examples carry dense targets for patches of this size in
            `meta["patch_labels"]` (`dense_labels`), which only training uses.
        seed: added to the split's own seed.
        kinds: weights of the kinds of questions, to train on hard ones; the benchmark's if not
            given.
        objects: least and most objects in an image, up to 64.
        shape_scale: size of the shapes, 1 for those of 96-pixel images; they grow with the image if
            not given, so that crowded images need a smaller one.
        backgrounds: folder, LMDB file or Parquet file of photographs to draw on, in place of noise
            and textures. Of every ten, eight are for train, one for val and one for test.

    >>> Scenes(questions=4, image_size=32).examples("test")[0].images[0].size
    (32, 32)
    """

    name: ClassVar[str] = "scenes"
    loss_kind: ClassVar[Literal["soft", "class"]] = "soft"
    questions: int = 5000
    per_picture: int = 1
    image_size: int = 96
    patch_size: int | None = None
    seed: int = 0
    kinds: Mapping[str, float] | None = None
    objects: tuple[int, int] = OBJECTS
    shape_scale: float | None = None
    backgrounds: str | None = None

    def __post_init__(self) -> None:
        if self.questions < 1 or self.per_picture < 1:
            raise ValueError("questions and per_picture are whole numbers from 1")
        check_style(self.image_size, self.objects, self.shape_scale)

    @property
    def labels(self) -> Sequence[str]:
        """All possible answers."""
        return ANSWERS

    def examples(self, split: str) -> MadeExamples:
        """The examples of a split, made when asked for."""
        if split not in SEEDS:
            raise ValueError(f"scenes have the splits {', '.join(SEEDS)}, not {split!r}")
        make = partial(self.make, SEEDS[split] + 10 * self.seed, split=split)
        if self.backgrounds is not None:
            photographs(self.backgrounds, split, self.image_size)  # which may not be there
        return MadeExamples(make, self.questions)

    def make(self, seed: int, indices: list[int], split: str = "train") -> list[Example]:
        """The examples of a seed with these indices, drawn in one batch."""
        each = self.per_picture
        image_indices = sorted({index // each for index in indices})
        behind = (
            ()
            if self.backgrounds is None
            else photographs(self.backgrounds, split, self.image_size)
        )
        scenes = draw_scenes(
            seed,
            image_indices,
            image_size=self.image_size,
            objects=self.objects,
            shape_scale=self.shape_scale,
            photographs=behind,
        )
        questions = ask(scenes, seed, image_indices, per_picture=each, kinds=self.kinds or KINDS)
        row = {image_index: row for row, image_index in enumerate(image_indices)}
        chosen = [questions[row[index // each] * each + index % each] for index in indices]
        size = self.patch_size
        labels = [None] * len(chosen) if size is None else list(dense_labels(scenes, chosen, size))
        images = scenes.images.permute(0, 2, 3, 1).numpy()
        return [
            Example(
                id=index,
                text=question.question,
                images=(Image.fromarray(images[question.image_index]),),
                target={ANSWERS.index(question.answer): 1.0},
                cluster=index // each,
                meta={"kind": question.kind, "answer": question.answer}
                | ({} if label is None else {"patch_labels": label}),
            )
            for index, question, label in zip(indices, chosen, labels, strict=True)
        ]

    def score(self, prediction: Any, example: Example) -> float:
        return float(prediction == example.meta["answer"])

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy per kind of question, in percent."""
        kinds: dict[str, list[float]] = {name: [] for name in KINDS}
        for score, example in zip(scores, examples, strict=True):
            kinds[example.meta["kind"]].append(score)
        return {
            name: round(100 * sum(values) / len(values), 2)
            for name, values in kinds.items()
            if values
        }

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        write_answers(path, predictions, examples)


class MadeExamples(Sequence[Example]):
    """Examples made on access, in batches where a loader asks for several."""

    def __init__(self, make: Callable[[list[int]], list[Example]], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        """The examples with these indices, drawn in one batch."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError("example number out of range")
        return self._make(indices)


def dense_labels(
    scenes: scene_data.Scenes, questions: Sequence[SceneQuestion], patch_size: int
) -> Tensor:
    """Dense targets of every patch, its object and its relation to the question: int64 [Q, N, 7].

    Class of the colour and of the shape; whether the question is about it (1; 2 for the second
    object of a comparison); the way to the object's middle, across and down, in pixels; and for the
    first object of a comparison whether the second lies to the left (1) or right (2) and above (1)
    or below (2), else 0. With the last two in view, comparing becomes matching a word with a
    feature, which small models learn long before they learn to compare.
    """
    rows = torch.tensor([question.image_index for question in questions])
    colour, shape = patch_targets(scenes, patch_size)
    compared = [
        replace(q, referents=q.referents if q.kind == "relation" else ()) for q in questions
    ]
    asked = referent_targets(scenes, questions, patch_size).long()
    second = referent_targets(
        scenes, [replace(q, referents=q.referents[1:]) for q in compared], patch_size
    ).long()
    first = referent_targets(
        scenes, [replace(q, referents=q.referents[:1]) for q in compared], patch_size
    ).long()
    pairs = torch.tensor([q.referents if q.referents else (0, 0) for q in compared])
    sides = []
    for centre in (scenes.x[rows], scenes.y[rows]):
        first_centre, other_centre = centre.gather(1, pairs).unbind(1)
        sides.append(first * torch.where(other_centre < first_centre, 1, 2)[:, None])
    labels = torch.stack([colour[rows], shape[rows], asked + second], dim=-1)
    return torch.cat(
        [labels, patch_offsets(scenes, patch_size)[rows], torch.stack(sides, dim=-1)], dim=-1
    )
