"""VQAv2: open questions about COCO images.

Goyal et al., "Making the V in VQA Matter", CVPR 2017. Files and images: visualqa.org.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pumer.data.images import ImageSource
from pumer.tasks.base import Example, first
from pumer.tasks.files import FileTask, wanted
from pumer.tasks.vqa_answers import (
    build_vocabulary,
    scores_in_words,
    soft_targets,
    vqa_score,
    write_answers,
)
from pumer.tasks.vqa_files import (
    Annotation,
    Question,
    images_of,
    read_annotations,
    read_common_answers,
    read_questions,
)


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
        labels: the answers that the model's head chooses from: `vocabulary_of(model.config.id2label)` for a
            trained model, `read_vocabulary(root)` for a new one. Not needed for a model that writes its answers.

    Splits: train2014, val2014, test2015, test-dev2015, or whatever the files are named for. Those beginning
    with "test" may lack annotations: they can be predicted and not scored. Targets give each answer the
    official score, in words if there are no `labels`; a question without any answer in `labels` has an all-zero
    target (PuMer keeps such questions; ViLT leaves them out).
    Raises ValueError when labels repeat.
    """

    name = "vqav2"
    loss_kind = "soft"
    labels: tuple[str, ...] = ()
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

    def count(self, rows: Sequence[_Row]) -> dict[str, int]:
        return {"questions": len(rows), "images": len(wanted(self, rows))}

    def read(self, split: str) -> Sequence[_Row]:
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
        """The score of every answer that an annotator gave: by number, or in words where there is no vocabulary."""
        return soft_targets(answers, self._index) if self.labels else scores_in_words(answers)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

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
    answers = [answer for split in splits for answer in read_common_answers(Path(root), split)]
    return build_vocabulary(answers, min_count, order)
