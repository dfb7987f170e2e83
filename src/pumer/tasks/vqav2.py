"""VQAv2: open questions about COCO images.

Goyal et al., "Making the V in VQA Matter", CVPR 2017. Files and images: visualqa.org.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pumer.tasks.base import Example, Task, first
from pumer.tasks.vqa_answers import ANNOTATORS, build_vocabulary, soft_targets, vqa_score, write_answers

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"


@dataclass(frozen=True)
class VQAv2(Task):
    """VQAv2 in its official files.

    Args:
        root: the folder of `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json`.
        labels: the answers that the model's head chooses from: `vocabulary_of(model.config.id2label)` for a
            trained model, `read_vocabulary(root)` for a new one. Not needed for a model that writes its answers.
        image_root: the folder of `train2014/`, `val2014/`, `test2015/` or of the images themselves; default `root`.

    Splits: train2014, val2014, test2015, test-dev2015, or whatever the files are named for. Those beginning
    with "test" may lack annotations: they can be predicted and not scored. Targets give each answer the
    official score; a question without any answer in `labels` has an all-zero target (PuMer keeps such
    questions; ViLT leaves them out).
    Raises ValueError when labels repeat.
    """

    name = "vqav2"
    loss_kind = "soft"
    root: str | Path
    labels: tuple[str, ...] = ()
    image_root: str | Path | None = None

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            repeated = [label for label, count in Counter(self.labels).items() if count > 1]
            raise ValueError(f"{first(repeated, len(self.labels), 'labels')} repeat; give every answer once.")

    def examples(self, split: str) -> Sequence[Example]:
        root = Path(self.root)
        path = root / _QUESTIONS.format(split)
        if not path.is_file():
            there = sorted(file.name for file in root.glob(_QUESTIONS.format("*")))
            raise ValueError(f"{path} does not exist; {root} has {', '.join(there) or 'no questions file'}.")
        questions = _by_question(path, "questions", ("question_id", "image_id", "question"))
        annotations = _annotations(root / _ANNOTATIONS.format(split), questions, needed=not split.startswith("test"))
        wanted = {row["image_id"] for row in questions.values()}
        images = _images(Path(self.image_root or root), split.replace("test-dev", "test"), wanted)
        return _Examples(list(questions.values()), annotations, images, self.labels)

    def score(self, prediction: str, example: Example) -> float:
        if example.meta["answers"] is None:
            raise ValueError(f"question {example.id} has no annotation; send the predictions to the EvalAI server.")
        return vqa_score(prediction, example.meta["answers"])

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
    splits: Sequence[str] = ("train2014", "val2014"),
    min_count: int = 9,
    order: Literal["sorted", "first"] = "sorted",
) -> tuple[str, ...]:
    """The answer vocabulary of the annotation files under `root`; see `build_vocabulary`."""
    answers = []
    for split in splits:
        path = Path(root) / _ANNOTATIONS.format(split)
        rows = _by_question(path, "annotations", ("question_id", "multiple_choice_answer"))
        answers += [row["multiple_choice_answer"] for row in rows.values()]
    return build_vocabulary(answers, min_count, order)


class _Annotation(NamedTuple):
    question_type: str | None
    answer_type: str | None
    answers: tuple[str, ...] | None


class _Examples(Sequence[Example]):
    """The questions of a split in the order of the file."""

    def __init__(
        self,
        questions: list[dict[str, Any]],
        annotations: dict[int, _Annotation],
        images: dict[int, Path],
        labels: Sequence[str],
    ):
        self._questions, self._annotations, self._images = questions, annotations, images
        self._index = {label: i for i, label in enumerate(labels)}

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        row = self._questions[index]
        annotation = self._annotations.get(row["question_id"], _Annotation(None, None, None))
        answers = annotation.answers
        return Example(
            id=row["question_id"],
            text=row["question"],
            images=(self._images[row["image_id"]],),
            target=soft_targets(answers, self._index) if answers and self._index else None,
            cluster=row["image_id"],
            meta=annotation._asdict(),
        )


def _by_question(path: Path, key: str, columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The rows of an official file by question id, reduced to `columns`."""
    try:
        # Millions of annotators' answers would take gigabytes as parsed: each becomes a shared string at once.
        rows = json.loads(
            path.read_bytes(), object_hook=lambda row: sys.intern(row["answer"]) if "answer" in row else row
        )[key]
        rows = [{column: row[column] for column in columns} for row in rows]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; get it from visualqa.org.") from None
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


def _images(root: Path, split: str, wanted: set[int]) -> dict[int, Path]:
    """The file of every wanted image, from one listing of the folder rather than a look at each file."""
    pattern = re.compile(rf"COCO_{re.escape(split)}_(\d{{12}})\.(jpg|png)")
    folders = [folder for folder in (root / split, root) if folder.is_dir()]
    found = {
        int(match[1]): file
        for folder in folders
        for file in folder.iterdir()
        if (match := pattern.fullmatch(file.name))
    }
    missing = sorted(wanted - found.keys())
    if missing:
        raise ValueError(
            f"{first(missing, len(wanted), 'images')} are neither in {root / split} nor in {root} as "
            f"COCO_{split}_<12 digits>.jpg or .png; set image_root to where they are."
        )
    return found
