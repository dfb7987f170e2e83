"""VQAv2: open questions about COCO images.

Goyal et al., "Making the V in VQA Matter", CVPR 2017. Files and images: visualqa.org.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pumer.lab.data.images import ImageSource
from pumer.lab.tasks.base import Example, count_of
from pumer.lab.tasks.files import FileTask, wanted
from pumer.lab.tasks.vqa_answers import (
    build_vocabulary,
    normalize,
    scores_in_words,
    soft_targets,
    vqa_score,
    write_answers,
)
from pumer.lab.tasks.vqa_files import (
    QUESTIONS,
    Annotation,
    Question,
    has_annotations,
    images_of,
    read_annotations,
    read_common_answers,
    read_questions,
)

OFFICIAL = ("train2014", "val2014")
"""Splits in which the published vocabulary of 3129 answers is counted."""
_LOG = logging.getLogger(__name__)


class _Row(NamedTuple):
    question: Question
    annotation: Annotation | None

    @property
    def id(self) -> int | str:
        return self.question.id


@dataclass(frozen=True)
class VQAv2(FileTask):
    """VQAv2 in its official files.

    `root` is the folder of `v2_OpenEnded_mscoco_{split}_questions.json` and
    `v2_mscoco_{split}_annotations.json`; OK-VQA's files, which lack the `v2_`, are read too.
    Images: `train2014/`, `val2014/`, `test2015/`, those of 2017, or all in one folder; keys such as
    `COCO_val2014_000000000012`. A question may name its image itself, as `image`: a file's name, or
    its path below the images.

    Args:
        labels: the answers that the model's head chooses from; those of the model if not given. Not
            needed for a model that writes its answers.
        answers: which answers a training teaches: "model", those of the model that it starts from;
            "data", a new list of those in the annotations, for data with other answers. A new model
            always takes those of the data.
        min_count: questions that have an answer as their `multiple_choice_answer`, below which a
            new list leaves it out; 9 gives the 3129 of VQAv2, a small set needs 1 or 2.
        answer_splits: splits whose annotations a new list counts; train2014 and val2014, as
            published, where both are there, else the split that is trained on.

    Splits: train2014, val2014, test2015, test-dev2015, or whatever the files are named for. Those
    beginning with "test" may lack annotations: they can be predicted and not scored. Targets give
    each answer the official score, in words if there are no `labels`; a question without any answer
    in `labels` has an all-zero target (PuMer keeps such questions; ViLT leaves them out). Raises
    ValueError when labels repeat.
    """

    name = "vqav2"
    loss_kind = "soft"
    split_files = QUESTIONS
    labels: tuple[str, ...] = ()
    answers: Literal["model", "data"] = "model"
    min_count: int = 9
    answer_splits: tuple[str, ...] = ()
    published: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "train2014": {"questions": 443_757, "images": 82_783},
        "val2014": {"questions": 214_354, "images": 40_504},
        "test2015": {"questions": 447_793, "images": 81_434},
        "test-dev2015": {"questions": 107_394},
    }

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            repeated = [label for label, count in Counter(self.labels).items() if count > 1]
            raise ValueError(
                f"{count_of(repeated, len(self.labels), 'labels')} repeat; give every answer once."
            )
        if self.min_count < 1:
            raise ValueError(f"min_count is {self.min_count}; give at least 1.")

    def count(self, rows: Sequence[_Row]) -> dict[str, int]:
        return {"questions": len(rows), "images": len(wanted(self, rows))}

    def read(self, split: str) -> Sequence[_Row]:
        """The questions of a split, with their annotations where there are any."""
        root = Path(self.root)
        questions = read_questions(root, split)
        annotations = read_annotations(root, split, questions)
        return [_Row(question, annotations.get(question.id)) for question in questions]

    def keys(self, row: _Row) -> tuple[str, ...]:
        return (row.question.key,)

    def places(self, split: str) -> Sequence[str]:
        return images_of(split), "train2017", "val2017", "test2017", ""

    def example(self, row: _Row, images: Sequence[ImageSource]) -> Example:
        question, annotation = row
        answers = None if annotation is None else annotation.answers
        return Example(
            id=question.id,
            text=question.text,
            images=images,
            target=self._scores(answers) if answers else None,
            cluster=question.image_id,
            meta={
                "question_type": annotation and annotation.question_type,
                "answer_type": annotation and annotation.answer_type,
                "answers": answers,
            },
        )

    def _scores(self, answers: Sequence[str]) -> dict[Any, float]:
        """The score of every annotator's answer: by index, or by word without a vocabulary."""
        if not self.labels:
            return scores_in_words(answers)
        # Published models were trained on raw strings; a new list holds normalized answers.
        return soft_targets(
            map(normalize, answers) if self.answers == "data" else answers, self._index
        )

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def score(self, prediction: str, example: Example) -> float:
        """The official score; raises ValueError for a question without annotation."""
        if example.meta["answers"] is None:
            raise ValueError(
                f"question {example.id} has no annotation; send the predictions to the EvalAI "
                "server."
            )
        return vqa_score(prediction, example.meta["answers"])

    def answer_scores(self, example: Example) -> Mapping[Any, float]:
        """The score of every annotator's answer, by word, whether or not it is in `labels`."""
        return scores_in_words(example.meta["answers"] or ())

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """The accuracy of each kind: `answer_type:number`, ..., `question_type:how many`, ..."""
        groups = defaultdict(list)
        for score, example in zip(scores, examples, strict=True):
            for key in ("answer_type", "question_type"):
                groups[f"{key}:{example.meta[key]}"].append(score)
        return {
            name: round(100 * sum(group) / len(group), 2) for name, group in sorted(groups.items())
        }

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write the JSON list that EvalAI takes: all of test2015, even if only test-dev is
        scored."""
        write_answers(path, predictions, examples)


def read_answers(root: str | Path, splits: Sequence[str]) -> list[str]:
    """The `multiple_choice_answer` of every annotated question of these splits."""
    return [answer for split in splits for answer in read_common_answers(Path(root), split)]


def with_new_answers(task: VQAv2, train_split: str) -> VQAv2:
    """The task with labels counted in its annotations; logs how many rare answers are dropped.

    Raises:
        ValueError: if no answer has `min_count` questions, and for missing files.
    """
    there = all(has_annotations(Path(task.root), split) for split in OFFICIAL)
    splits = task.answer_splits or (OFFICIAL if there else (train_split,))
    answers = read_answers(task.root, splits)
    labels = build_vocabulary(answers, task.min_count)
    old_labels = set(labels)
    rare = [answer for answer in map(normalize, answers) if answer not in old_labels]
    if rare:
        _LOG.warning(
            "%d of %d answers have fewer than %d questions and are left out, with %d of %d "
            "questions: "
            "lower task.min_count to keep them",
            len(set(rare)),
            len(set(rare)) + len(labels),
            task.min_count,
            len(rare),
            len(answers),
        )
    return replace(task, labels=labels)
