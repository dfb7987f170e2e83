"""SNLI-VE: does a photograph contradict a sentence, leave it open, or entail it?

Xie et al., "Visual Entailment: A Novel Task for Fine-Grained Image Understanding", 2019
(github.com/necla-ml/SNLI-VE; images: Flickr30k).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pumer._files import replacing
from pumer.lab.data.images import ImageSource
from pumer.lab.tasks.base import Example, check_ids, check_labels, label_score
from pumer.lab.tasks.files import FileTask, all_or_none_labelled, label_of, read_lines, strings

FLICKR30K = ("flickr30k_images", "flickr30k-images", "images", "")
"""Where the images of Flickr30k lie below a data folder."""
_DISPUTED = "-"


class _Row(NamedTuple):
    id: str
    image: str
    hypothesis: str
    target: int | None
    disputed: bool


@dataclass(frozen=True)
class SNLIVE(FileTask):
    """SNLI-VE in its official files: a Flickr30k photograph and a hypothesis (`sentence2`), three
    classes.

    `root` is the folder of `snli_ve_{train,dev,test}.jsonl`. Images:
    `flickr30k_images/<Flickr30K_ID>.jpg`, or all in one folder. The caption that the hypothesis was
    written for (`sentence1`) is not shown to the model. Splits: "train", "dev", "test". Rows
    labelled "-", on which SNLI's annotators did not agree, are left out, with a warning that counts
    them. A file without any label can be predicted.
    """

    name = "snli-ve"
    loss_kind = "class"
    split_files = ("snli_ve_{}.jsonl",)
    labels = ("contradiction", "neutral", "entailment")
    published: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "train": {"examples": 529_527, "images": 29_783},
        "dev": {"examples": 17_858, "images": 1_000},
        "test": {"examples": 17_901, "images": 1_000},
    }

    def read(self, split: str) -> Sequence[_Row]:
        """The rows of a split's JSON-lines file, without disputed ones."""
        path = Path(self.root) / f"snli_ve_{split}.jsonl"
        rows = read_lines(path, self._parse, "github.com/necla-ml/SNLI-VE")
        agreed = [row for row in rows if not row.disputed]
        if not agreed:
            raise ValueError(f"{path} has no row to use: {len(rows)} are labelled {_DISPUTED!r}.")
        if len(agreed) < len(rows):
            warnings.warn(
                f"{len(rows) - len(agreed)} of {len(rows)} rows of {path} are labelled "
                f"{_DISPUTED!r}, "
                "as annotators did not agree, and left out",
                stacklevel=2,
            )
        return all_or_none_labelled(agreed, path)

    def _parse(self, row: Any) -> _Row:
        pair, image, hypothesis = strings(row, "pairID", "Flickr30K_ID", "sentence2")
        disputed = row.get("gold_label") == _DISPUTED
        label = None if disputed else label_of(row, "gold_label", self.labels)
        return _Row(pair, image, hypothesis, label, disputed)

    def keys(self, row: _Row) -> tuple[str, ...]:
        return (row.image,)

    def places(self, split: str) -> Sequence[str]:
        return FLICKR30K

    def example(self, row: _Row, images: Sequence[ImageSource]) -> Example:
        return Example(
            id=row.id, text=row.hypothesis, images=images, target=row.target, cluster=row.image
        )

    def score(self, prediction: str, example: Example) -> float:
        return label_score(prediction, example, self.labels)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """The accuracy of each class: `label:neutral`, ..."""
        result = {}
        for label_index, label in enumerate(self.labels):
            group = [
                score
                for score, example in zip(scores, examples, strict=True)
                if example.target == label_index
            ]
            if group:
                result[f"label:{label}"] = round(100 * sum(group) / len(group), 2)
        return result

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write a JSON object per line, `pairID` and `prediction`; there is no official format."""
        ids = check_ids(predictions, examples)
        check_labels(predictions, self.labels)
        with replacing(path) as file:
            file.writelines(
                json.dumps({"pairID": name, "prediction": predictions[name]}) + "\n" for name in ids
            )
