"""The official files of VQAv2, and of data sets in its format: questions and annotations.

Everything is validated on reading; errors name file and question.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pumer.lab.tasks.base import count_of
from pumer.lab.tasks.files import MissingFileError, read_rows, strings
from pumer.lab.tasks.vqa_answers import ANNOTATORS

# VQAv2's names, then those of VQA v1 and OK-VQA.
QUESTIONS = ("v2_OpenEnded_mscoco_{}_questions.json", "OpenEnded_mscoco_{}_questions.json")
_ANNOTATIONS = ("v2_mscoco_{}_annotations.json", "mscoco_{}_annotations.json")
R = TypeVar("R", bound="Question | Annotation | _Common")


class Question(NamedTuple):
    """A question; `key` is that of its image, `image_id` COCO's number or another name for it."""

    id: int | str
    text: str
    image_id: int | str
    key: str


class Annotation(NamedTuple):
    """The annotators' answers to a question."""

    id: int | str
    image_id: int | str | None
    question_type: str
    answer_type: str
    answers: tuple[str, ...]


class _Common(NamedTuple):
    id: int | str
    answer: str


def images_of(split: str) -> str:
    """The split whose images the questions are about."""
    return split.replace("test-dev", "test")


def read_questions(root: Path, split: str) -> list[Question]:
    """The questions of a split; raises ValueError for a file that is missing or wrong."""
    path = _find(root, QUESTIONS, split)
    if path is None:
        names = {file.name for name in QUESTIONS for file in root.glob(name.format("*"))}
        missing = root / QUESTIONS[0].format(split)
        there = ", ".join(sorted(names)) or "no questions file"
        raise MissingFileError(missing, f"{root} has {there}")
    # COCO has the split in the names of its images up to 2015.
    image = "{:012d}" if split.endswith("2017") else f"COCO_{images_of(split)}_{{:012d}}"

    def parse(row: Any) -> Question:
        (text,) = strings(row, "question")
        if "image" in row:
            (key,) = strings(row, "image")
            return Question(
                _id(row), text, _name(row, "image_id") if "image_id" in row else key, key
            )
        image_id = row.get("image_id")
        if not isinstance(image_id, int) or isinstance(image_id, bool):
            problem = (
                f"image_id is {image_id!r}, not a number"
                if "image_id" in row
                else "there is no image_id"
            )
            raise ValueError(f"{problem}; give COCO's, or the image's file name as image")
        return Question(_id(row), text, image_id, image.format(image_id))

    return _read(path, "questions", parse)


def read_annotations(
    root: Path, split: str, questions: Sequence[Question]
) -> Mapping[int | str, Annotation]:
    """The annotations of these questions by question id; none where a test split has no file.

    Raises ValueError for a file that is missing or wrong, or does not fit the questions.
    """
    path = _find(root, _ANNOTATIONS, split)
    if path is None:
        if split.startswith("test"):
            return {}
        # The questions are there, so that the split is not absent but incomplete.
        raise ValueError(str(_no_annotations(root, split)))
    rows = {row.id: row for row in _read(path, "annotations", _annotation)}
    missing = [question.id for question in questions if question.id not in rows]
    if missing:
        raise ValueError(
            f"{path}: {count_of(missing, len(questions), 'questions')} have no annotation."
        )
    # A question that names its image needs no image_id, and annotations need not know that name.
    numbered = [question for question in questions if question.image_id != question.key]
    other = [
        question.id
        for question in numbered
        if rows[question.id].image_id not in (None, question.image_id)
    ]
    if other:
        raise ValueError(
            f"{path}: {count_of(other, len(questions), 'questions')} have another image_id than in "
            "the questions file; are the two of one release?"
        )
    return rows


def has_annotations(root: Path, split: str) -> bool:
    """Whether the annotations of a split are there."""
    return _find(root, _ANNOTATIONS, split) is not None


def read_common_answers(root: Path, split: str) -> list[str]:
    """Every question's `multiple_choice_answer`; raises ValueError for a missing or wrong file."""
    path = _find(root, _ANNOTATIONS, split)
    if path is None:
        raise _no_annotations(root, split)
    return [row.answer for row in _read(path, "annotations", _common)]


def _common(row: Any) -> _Common:
    question_id = _id(row)
    (answer,) = _texts(row, "multiple_choice_answer")
    return _Common(question_id, answer)


def _annotation(row: Any) -> Annotation:
    question_id = _id(row)
    answers = row.get("answers")
    if not isinstance(answers, list):
        problem = (
            f"answers is {answers!r}, not a list" if "answers" in row else "there are no answers"
        )
        raise ValueError(problem)
    odd = [answer for answer in answers if not isinstance(answer, str)]
    if odd:
        raise ValueError(f'answers has {odd[0]!r}, which is no {{"answer": TEXT}}')
    if len(answers) != ANNOTATORS:
        raise ValueError(
            f"it has {len(answers)} answers, not {ANNOTATORS}; where a question has only one, "
            "repeat it"
        )
    question_type, answer_type = _texts(row, "question_type", "answer_type")
    image = _name(row, "image_id") if "image_id" in row else None
    return Annotation(question_id, image, question_type, answer_type, tuple(answers))


def _read(path: Path, key: str, parse: Callable[[Any], R]) -> list[R]:
    """The rows under a key of an official file."""
    try:
        content = json.loads(path.read_bytes(), object_hook=_shared_answers)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again.") from error
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no VQAv2 {key} file: there is no list of {key}.")
    return read_rows(_named(path, key, rows), parse)


def _named(path: Path, key: str, rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        question_id = row.get("question_id") if isinstance(row, dict) else None
        has_id = isinstance(question_id, int | str) and str(question_id).strip()
        yield f"{path}: question {question_id}" if has_id else f"{path}: {key}[{index}]", row


def _shared_answers(row: dict[str, Any]) -> Any:
    """An annotator's answer as an interned string: millions of parsed strings would take
    gigabytes."""
    if isinstance(row.get("answer"), str) and row.keys() <= _ANSWER:
        return sys.intern(row["answer"])
    return row


_ANSWER = {"answer", "answer_confidence", "answer_id", "raw_answer"}
"""The keys of an annotator's answer, OK-VQA's included."""


def _id(row: Any) -> int | str:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    return _name(row, "question_id")


def _name(row: Mapping[str, Any], key: str) -> int | str:
    """A number or text used as a name."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        problem = f"{key} is {value!r}, not a number or name"
        raise ValueError(problem if key in row else f"there is no {key}")
    return value


def _texts(row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """Texts that may be blank."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(
                f"{name} is {row[name]!r}, not a text" if name in row else f"there is no {name}"
            )
    return tuple(row[name] for name in names)


def _find(root: Path, names: Sequence[str], split: str) -> Path | None:
    paths = [root / name.format(split) for name in names]
    return next((path for path in paths if path.is_file()), None)


def _no_annotations(root: Path, split: str) -> MissingFileError:
    return MissingFileError(root / _ANNOTATIONS[0].format(split), "get it from visualqa.org")
