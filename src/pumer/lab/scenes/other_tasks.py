"""NLVR2, visual entailment and retrieval on generated images, made on the fly.

`pumer data scenes` writes the same images and sentences in official files; the metrics are the
official tasks'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from pumer.lab.data.images import ImageSource
from pumer.lab.scenes import hypotheses as scene_hypotheses
from pumer.lab.scenes import statements as scene_statements
from pumer.lab.scenes.captions import describe, mistake
from pumer.lab.scenes.drawing import Scenes, draw_scenes
from pumer.lab.scenes.hypotheses import suppose
from pumer.lab.scenes.sets import draw_sets
from pumer.lab.scenes.statements import PAIRS, state
from pumer.lab.scenes.tasks import SEEDS, MadeExamples
from pumer.lab.scenes.views import dice_of, pick, views
from pumer.lab.tasks.base import Example, Task
from pumer.lab.tasks.nlvr2 import NLVR2
from pumer.lab.tasks.retrieval import Pool, Retrieval
from pumer.lab.tasks.snli_ve import SNLIVE

_OTHERS = 8  # images that lend each other their captions
_OTHER_SIZE = 32  # side of images drawn for their captions alone


@dataclass(frozen=True)
class SceneTask(Task):
    """Base of the tasks; examples are deterministic by seed and index.

    Args:
        questions: examples in a split.
        image_size: side in pixels.
        seed: added to the split's own seed.
    """

    official: ClassVar[Task]
    """The task whose metric and prediction files are used."""
    questions: int = 5000
    image_size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ValueError("questions is a whole number from 1")

    @property
    def labels(self) -> Sequence[str]:
        """Those of the official task."""
        return self.official.labels

    @abstractmethod
    def make(self, split: str, indices: list[int]) -> list[Example]:
        """The examples with these indices, drawn in one batch."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, made when asked for."""
        self._seed(split)
        return MadeExamples(partial(self.make, split), self.questions)

    def score(self, prediction: Any, example: Example) -> float:
        return self.official.score(prediction, example)

    def decode(self, logits: Tensor) -> list[Any]:
        return self.official.decode(logits)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """What the official task reports, and accuracy per kind of sentence, in percent."""
        kinds: dict[str, list[float]] = {}
        for score, example in zip(scores, examples, strict=True):
            kinds.setdefault(example.meta["kind"], []).append(score)
        accuracies = {
            name: round(100 * sum(values) / len(values), 2)
            for name, values in sorted(kinds.items())
        }
        return self.official.details(scores, examples) | accuracies

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        self.official.write_predictions(path, predictions, examples)

    def _seed(self, split: str) -> int:
        if split not in SEEDS:
            raise ValueError(f"scenes have the splits {', '.join(SEEDS)}, not {split!r}")
        return SEEDS[split] + 10 * self.seed


@dataclass(frozen=True)
class ScenesNLVR2(SceneTask):
    """Scenes-NLVR2: is a sentence true of two images? See `pumer.lab.scenes.statements`.

    Every four examples share a sentence and four images, which are drawn again for each example in
    random access.

    Args:
        kinds: weight of every kind of sentence; the benchmark's own if not given.
    """

    name: ClassVar[str] = "scenes-nlvr2"
    loss_kind: ClassVar[Literal["soft", "class", "rank"]] = "class"
    image_count: ClassVar[int] = 2
    official: ClassVar[Task] = NLVR2(root="")
    kinds: Mapping[str, float] | None = None

    def make(self, split: str, indices: list[int]) -> list[Example]:
        say = partial(state, kinds=self.kinds or scene_statements.KINDS)
        wanted = [divmod(index, len(PAIRS)) for index in indices]
        scenes, sets = draw_sets(
            self._seed(split), [n for n, _ in wanted], 4, say, image_size=self.image_size
        )
        images = _images(scenes)
        examples = []
        for set_index, pair in wanted:
            rows, statement = sets[set_index].rows, sets[set_index].said
            examples.append(
                Example(
                    id=f"{split}-{set_index}-{pair}-0",
                    text=statement.sentence,
                    images=tuple(images[rows[position]] for position in PAIRS[pair]),
                    target=int(statement.labels[pair]),
                    cluster=set_index,
                    meta={"kind": statement.kind, "group": (split, set_index)},
                )
            )
        return examples


@dataclass(frozen=True)
class ScenesVE(SceneTask):
    """Scenes-VE: does an image contradict a hypothesis, leave it open, or entail it?
    `pumer.lab.scenes.hypotheses` says what that means.

    Nine examples in turn share three images and three hypotheses; the images are drawn anew for
    each if examples are asked for in a random order.

    Args:
        kinds: weight of every kind of hypothesis; the benchmark's own if not given.
    """

    name: ClassVar[str] = "scenes-ve"
    loss_kind: ClassVar[Literal["soft", "class", "rank"]] = "class"
    official: ClassVar[Task] = SNLIVE(root="")
    kinds: Mapping[str, float] | None = None

    def make(self, split: str, indices: list[int]) -> list[Example]:
        say = partial(suppose, kinds=self.kinds or scene_hypotheses.KINDS)
        wanted = [divmod(index, 9) for index in indices]
        scenes, sets = draw_sets(
            self._seed(split), [n for n, _ in wanted], 3, say, image_size=self.image_size
        )
        images = _images(scenes)
        examples = []
        for set_index, position in wanted:
            image_index, hypothesis = position // 3, sets[set_index].said[position % 3]
            label = hypothesis.labels[image_index]
            examples.append(
                Example(
                    id=f"{3 * set_index + image_index}.jpg#0r1{self.labels[label][0]}",
                    text=hypothesis.sentence,
                    images=(images[sets[set_index].rows[image_index]],),
                    target=label,
                    cluster=set_index,
                    meta={"kind": hypothesis.kind},
                )
            )
        return examples


@dataclass(frozen=True)
class ScenesRetrieval(SceneTask):
    """Scenes-retrieval: which caption belongs to an image, which image to a caption?

    An example is an image, a caption of it and others that do not fit it: in turn its own with one
    thing changed and one of another image. What is published for retrieval takes `pool` and
    `pumer.lab.tasks.retrieval.recalls`.

    Args:
        negatives: captions in an example that do not fit.
        pictures: in a pool, with five captions each.
    """

    name: ClassVar[str] = "scenes-retrieval"
    loss_kind: ClassVar[Literal["soft", "class", "rank"]] = "rank"
    official: ClassVar[Task] = Retrieval(root="")
    negatives: int = 7
    pictures: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 0 or self.pictures < 1:
            raise ValueError("negatives is a whole number from 0, pictures from 1")

    def make(self, split: str, indices: list[int]) -> list[Example]:
        seed = self._seed(split)
        scenes = draw_scenes(seed, indices, image_size=self.image_size)
        near = [
            first + k
            for first in sorted({i // _OTHERS * _OTHERS for i in indices})
            for k in range(_OTHERS)
        ]
        others = dict(
            zip(near, views(draw_scenes(seed, near, image_size=_OTHER_SIZE)), strict=True)
        )
        examples = []
        for index, view, image in zip(indices, views(scenes), _images(scenes), strict=True):
            dice = dice_of(seed, index)
            caption = pick(dice, describe(view, dice))
            negatives: dict[str, None] = {}
            lender = 0
            while len(negatives) < self.negatives:
                if len(negatives) % 2:
                    lender += 1
                    other = describe(others[index ^ (lender % (_OTHERS - 1) + 1)], dice, 1)[0]
                    if other.fits(view):
                        continue
                else:
                    other = mistake(caption, view, dice)
                negatives[other.text] = None
            examples.append(
                Example(
                    id=index,
                    text=caption.text,
                    images=(image,),
                    target=0,
                    cluster=index,
                    meta={"kind": caption.kind},
                    negatives=tuple(negatives),
                )
            )
        return examples

    def pool(self, split: str) -> Pool:
        """The first `pictures` of a split and five captions of each."""
        seed, numbers = self._seed(split), list(range(self.pictures))
        each = 5
        scenes = draw_scenes(seed, numbers, image_size=self.image_size)
        captions = [
            caption.text
            for scene_index, view in zip(numbers, views(scenes), strict=True)
            for caption in describe(view, dice_of(seed, scene_index), each)
        ]
        return Pool(
            images=_images(scenes),
            image_ids=numbers,
            captions=captions,
            caption_ids=list(range(len(captions))),
            image_of=np.arange(len(captions)) // each,
        )


def _images(scenes: Scenes) -> list[ImageSource]:
    return [Image.fromarray(image) for image in scenes.images.permute(0, 2, 3, 1).numpy()]
