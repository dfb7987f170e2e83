"""Questions about generated pictures, made on the fly: the built-in benchmark, and endless training data.

The same pictures as official VQAv2 files come from `pumer data scenes`; both are read with the same metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from pumer.data.scene_questions import ANSWERS, KINDS, ask, referent_targets
from pumer.data.scenes import draw, patch_offsets, patch_targets
from pumer.tasks.base import Example, Task
from pumer.tasks.vqa_answers import write_answers

SEEDS = {"train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class Scenes(Task):
    """Scenes-VQA: pictures of 4 to 10 textured shapes with template questions, deterministic by seed.

    Args:
        questions: in a split.
        per_picture: questions about one picture.
        image_size: side in pixels.
        patch_size: if given, examples carry dense targets for patches of this size in `meta["patch_labels"]`
            (colour, shape, asked about, way to the object's middle), which only training uses.
        seed: added to the split's own seed.
        kinds: weight of every kind of question, for training on what is hard; the benchmark's own if not given.
    """

    name: ClassVar[str] = "scenes"
    loss_kind: ClassVar[Literal["soft", "class"]] = "soft"
    questions: int = 5000
    per_picture: int = 1
    image_size: int = 96
    patch_size: int | None = None
    seed: int = 0
    kinds: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.questions < 1 or self.per_picture < 1:
            raise ValueError("questions and per_picture are whole numbers from 1")

    @property
    def labels(self) -> Sequence[str]:
        return ANSWERS

    def examples(self, split: str) -> SceneExamples:
        if split not in SEEDS:
            raise ValueError(f"scenes have the splits {', '.join(SEEDS)}, not {split!r}")
        return SceneExamples(self, SEEDS[split] + 10 * self.seed)

    def score(self, prediction: Any, example: Example) -> float:
        return float(ANSWERS.index(prediction) in example.target)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy per kind of question, in percent."""
        kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for score, example in zip(scores, examples, strict=True):
            kinds[example.meta["kind"]].append(score)
        return {kind: round(100 * sum(values) / len(values), 2) for kind, values in kinds.items() if values}

    def write_predictions(self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]) -> None:
        write_answers(path, predictions, examples)


class SceneExamples(Sequence[Example]):
    """Examples of one seed; drawn when asked for, many at a time where a loader asks for many."""

    def __init__(self, task: Scenes, seed: int) -> None:
        self.task, self.seed = task, seed

    def __len__(self) -> int:
        return self.task.questions

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        """The examples with these numbers, their pictures drawn together."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError("example number out of range")
        each = self.task.per_picture
        pictures = sorted({index // each for index in indices})
        scenes = draw(self.seed, pictures, image_size=self.task.image_size)
        questions = ask(scenes, self.seed, pictures, per_picture=each, kinds=self.task.kinds or KINDS)
        row = {picture: number for number, picture in enumerate(pictures)}
        chosen = [questions[row[index // each] * each + index % each] for index in indices]
        labels = [None] * len(chosen)
        if self.task.patch_size is not None:
            colour, shape = patch_targets(scenes, self.task.patch_size)
            # The two objects of a relation are told apart: without that, small models never learn to compare them.
            others = [replace(q, referents=q.referents[1:] if q.kind == "relation" else ()) for q in chosen]
            asked, other = (referent_targets(scenes, asked, self.task.patch_size) for asked in (chosen, others))
            rows = [question.picture for question in chosen]
            offsets = patch_offsets(scenes, self.task.patch_size)
            known = torch.stack([colour[rows], shape[rows], asked.long() + other.long()], dim=-1)
            labels = list(torch.cat([known, offsets[rows]], dim=-1))
        images = scenes.images.permute(0, 2, 3, 1).numpy()
        return [
            Example(
                id=index,
                text=question.question,
                images=(Image.fromarray(images[question.picture]),),
                target={ANSWERS.index(question.answer): 1.0},
                cluster=index // each,
                meta={"kind": question.kind, "answer": question.answer}
                | ({} if label is None else {"patch_labels": label}),
            )
            for index, question, label in zip(indices, chosen, labels, strict=True)
        ]
