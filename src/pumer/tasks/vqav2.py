"""VQAv2: open questions about COCO images.

Goyal et al., "Making the V in VQA Matter", CVPR 2017. Files and images: visualqa.org.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pumer.data.images import ImageSource
from pumer.tasks.base import Example, first
from pumer.tasks.files import FileTask, MissingFileError, wanted
from pumer.tasks.vqa_answers import (
    ANNOTATORS,
    build_vocabulary,
    normalize,
    scores_in_words,
    soft_targets,
    vqa_score,
    write_answers,
)

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
OFFICIAL = ("train2014", "val2014")
"""Splits that the published vocabulary of 3129 answers is counted in."""
_LOG = logging.getLogger(__name__)


class _Annotation(NamedTuple):
    question_type: str | None
    answer_type: str | None
    answers: tuple[str, ...] | None


class _Row(NamedTuple):
    id: int
    question: str
    image_id: int
    key: str
    annotation: _Annotation | None


@dataclass(frozen=True)
class VQAv2(FileTask):
    """VQAv2 in its official files.

    `root` is the folder of `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json`.
    Images: `train2014/`, `val2014/`, `test2015/`, or all in one folder; keys such as
    `COCO_val2014_000000000012`.

    Args:
        labels: the answers that the model's head chooses from; those of the model if not given. Not needed for a
            model that writes its answers.
        answers: which answers a training teaches: "model", those of the model that it starts from; "data", a new list
            of those in the annotations, for data with other answers. A new model always takes those of the data.
        min_count: questions that have an answer as their `multiple_choice_answer`, below which a new list leaves it
            out; 9 gives the 3129 of VQAv2, a small set needs 1 or 2.
        answer_splits: splits whose annotations a new list counts; train2014 and val2014, as published, where both are
            there, else the split that is trained on.

    Splits: train2014, val2014, test2015, test-dev2015, or whatever the files are named for. Those beginning
    with "test" may lack annotations: they can be predicted and not scored. Targets give each answer the
    official score, in words if there are no `labels`; a question without any answer in `labels` has an all-zero
    target (PuMer keeps such questions; ViLT leaves them out).
    Raises ValueError when labels repeat.
    """

    name = "vqav2"
    loss_kind = "soft"
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
            raise ValueError(f"{first(repeated, len(self.labels), 'labels')} repeat; give every answer once.")
        if self.min_count < 1:
            raise ValueError(f"min_count is {self.min_count}; give at least 1.")

    def count(self, rows: Sequence[_Row]) -> dict[str, int]:
        return {"questions": len(rows), "images": len(wanted(self, rows))}

    def read(self, split: str) -> Sequence[_Row]:
        root = Path(self.root)
        path = root / _QUESTIONS.format(split)
        if not path.is_file():
            there = sorted(file.name for file in root.glob(_QUESTIONS.format("*")))
            raise MissingFileError(f"{path} does not exist; {root} has {', '.join(there) or 'no questions file'}.")
        questions = _by_question(path, "questions", ("question_id", "image_id", "question"))
        odd = [question for question, row in questions.items() if not isinstance(row["image_id"], int)]
        if odd:
            raise ValueError(f"{path}: {first(odd, len(questions), 'questions')} have an image_id that is no number.")
        annotations = _annotations(root / _ANNOTATIONS.format(split), questions, needed=not split.startswith("test"))
        image = f"COCO_{_images_of(split)}_{{:012d}}"
        return [
            _Row(number, row["question"], row["image_id"], image.format(row["image_id"]), annotations.get(number))
            for number, row in questions.items()
        ]

    def keys(self, row: _Row) -> tuple[str, ...]:
        return (row.key,)

    def places(self, split: str) -> Sequence[str]:
        return _images_of(split), ""

    def example(self, row: _Row, images: Sequence[ImageSource]) -> Example:
        annotation = row.annotation or _Annotation(None, None, None)
        answers = annotation.answers
        return Example(
            id=row.id,
            text=row.question,
            images=images,
            target=self._scores(answers) if answers else None,
            cluster=row.image_id,
            meta=annotation._asdict(),
        )

    def _scores(self, answers: Sequence[str]) -> dict[Any, float]:
        """The score of every answer that an annotator gave: by number, or in words where there is no vocabulary."""
        if not self.labels:
            return scores_in_words(answers)
        # Published models were taught raw strings; a new list holds normalised ones, however the data writes them.
        return soft_targets(map(normalize, answers) if self.answers == "data" else answers, self._index)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def score(self, prediction: str, example: Example) -> float:
        if example.meta["answers"] is None:
            raise ValueError(f"question {example.id} has no annotation; send the predictions to the EvalAI server.")
        return vqa_score(prediction, example.meta["answers"])

    def answer_scores(self, example: Example) -> Mapping[Any, float]:
        """The score of every answer that an annotator gave, in words, whether or not it is in `labels`."""
        return scores_in_words(example.meta["answers"] or ())

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """The accuracy of each kind: `answer_type:number`, ..., `question_type:how many`, ..."""
        groups = defaultdict(list)
        for score, example in zip(scores, examples, strict=True):
            for kind in ("answer_type", "question_type"):
                groups[f"{kind}:{example.meta[kind]}"].append(score)
        return {name: round(100 * sum(group) / len(group), 2) for name, group in sorted(groups.items())}

    def write_predictions(self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]) -> None:
        """Write the JSON list that EvalAI takes: all of test2015, also where only test-dev is scored."""
        write_answers(path, predictions, examples)


def read_vocabulary(
    root: str | Path,
    splits: Sequence[str] = OFFICIAL,
    min_count: int = 9,
    order: Literal["sorted", "first"] = "sorted",
) -> tuple[str, ...]:
    """The answer vocabulary of the annotation files under `root`; see `build_vocabulary`."""
    return build_vocabulary(read_answers(root, splits), min_count, order)


def read_answers(root: str | Path, splits: Sequence[str]) -> list[str]:
    """The `multiple_choice_answer` of every annotated question of these splits."""
    answers = []
    for split in splits:
        path = Path(root) / _ANNOTATIONS.format(split)
        rows = _by_question(path, "annotations", ("question_id", "multiple_choice_answer"))
        answers += [row["multiple_choice_answer"] for row in rows.values()]
    return answers


def with_new_answers(task: VQAv2, train_split: str) -> VQAv2:
    """The task with labels counted in its annotations; says how many rare answers are left out.

    Raises ValueError where no answer has `min_count` questions, and for missing files.
    """
    there = all((Path(task.root) / _ANNOTATIONS.format(split)).is_file() for split in OFFICIAL)
    splits = task.answer_splits or (OFFICIAL if there else (train_split,))
    answers = read_answers(task.root, splits)
    labels = build_vocabulary(answers, task.min_count)
    known = set(labels)
    rare = [answer for answer in map(normalize, answers) if answer not in known]
    if rare:
        _LOG.warning(
            "%d of %d answers have fewer than %d questions and are left out, with %d of %d questions: "
            "lower task.min_count to keep them",
            len(set(rare)),
            len(set(rare)) + len(labels),
            task.min_count,
            len(rare),
            len(answers),
        )
    return replace(task, labels=labels)


def _images_of(split: str) -> str:
    """The split whose images the questions are about."""
    return split.replace("test-dev", "test")


def _by_question(path: Path, key: str, columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The rows of an official file by question id, reduced to `columns`."""
    try:
        # Millions of annotators' answers would take gigabytes as parsed: each becomes a shared string at once.
        rows = json.loads(
            path.read_bytes(), object_hook=lambda row: sys.intern(row["answer"]) if "answer" in row else row
        )[key]
        rows = [{column: row[column] for column in columns} for row in rows]
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; get it from visualqa.org.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again.") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no VQAv2 {key} file ({type(error).__name__}: {error}).") from error
    by_question = {row["question_id"]: row for row in rows}
    if len(by_question) < len(rows):
        repeated = [name for name, n in Counter(row["question_id"] for row in rows).items() if n > 1]
        raise ValueError(f"{path}: {first(repeated, len(by_question), 'question ids')} repeat; keep one row of each.")
    return by_question


def _annotations(path: Path, questions: Mapping[int, Any], needed: bool) -> dict[int, _Annotation]:
    if not needed and not path.exists():
        return {}
    columns = ("question_id", *_Annotation._fields)
    rows = _by_question(path, "annotations", columns)
    missing = [question for question in questions if question not in rows]
    if missing:
        raise ValueError(f"{path}: {first(missing, len(questions), 'questions')} have no annotation.")
    odd = [question for question, row in rows.items() if len(row["answers"]) != ANNOTATORS]
    if odd:
        raise ValueError(
            f"{path}: {first(odd, len(rows), 'questions')} do not have {ANNOTATORS} answers; where there "
            f"is only one answer a question, repeat it {ANNOTATORS} times."
        )
    return {
        question: _Annotation(row["question_type"], row["answer_type"], tuple(row["answers"]))
        for question, row in rows.items()
    }
