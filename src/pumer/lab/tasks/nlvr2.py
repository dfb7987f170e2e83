"""NLVR2: is a sentence true of a pair of photographs?

Suhr et al., "A Corpus for Reasoning about Natural Language Grounded in Photographs", ACL 2019
(github.com/lil-lab/nlvr: sentences and labels CC-BY-4.0; images on request).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pumer._files import replacing
from pumer.lab.data.images import ImageSource
from pumer.lab.tasks.base import Example, check_ids, check_labels, label_score
from pumer.lab.tasks.files import FileTask, all_or_none_labelled, label_of, read_lines, strings

_IDENTIFIER = re.compile(r"(\w+)-(\d+)-(\d+)-(\d+)")


class _Row(NamedTuple):
    id: str
    sentence: str
    target: int | None

    @property
    def parts(self) -> list[str]:
        """Split, set, pair, sentence."""
        return self.id.split("-")


@dataclass(frozen=True)
class NLVR2(FileTask):
    """NLVR2 in its official files: two photographs, left and right, and a sentence, False (0) or
    True (1).

    `root` is the folder of `train.json`, `dev.json`, `test1.json` and `test2.json`, which hold a
    JSON object a line. Images: `images/train/<directory>/`, `dev/`, `test1/`, also below `images/`,
    or all in one folder; keys such as `dev-12-1-img0`. Splits: "train", "dev", "test1", "test2", or
    another file under `root`, by its path without ".json". A file without any label can be
    predicted.
    """

    name = "nlvr2"
    loss_kind = "class"
    image_count = 2
    labels = ("False", "True")
    published: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "train": {"examples": 86_373},
        "dev": {"examples": 6_982},
        "test1": {"examples": 6_967},
        "test2": {"examples": 6_970},
    }

    def read(self, split: str) -> Sequence[_Row]:
        """The rows of a split's JSON-lines file."""
        path = Path(self.root) / f"{split}.json"
        rows = read_lines(path, self._parse, "github.com/lil-lab/nlvr, nlvr2/data")
        return all_or_none_labelled(rows, path)

    def _parse(self, row: Any) -> _Row:
        identifier, sentence = strings(row, "identifier", "sentence")
        if not _IDENTIFIER.fullmatch(identifier):
            raise ValueError(
                f"identifier {identifier!r} is not of the form split-set-pair-sentence"
            )
        return _Row(identifier, sentence, label_of(row, "label", self.labels))

    def keys(self, row: _Row) -> tuple[str, ...]:
        pair = row.id.rpartition("-")[0]
        return f"{pair}-img0", f"{pair}-img1"

    def places(self, split: str) -> Sequence[str]:
        words = [word for word in ("train", "dev", "test1", "test2") if word in split] or [split]
        return [
            pattern
            for word in words
            for pattern in (f"images/{word}", f"images/{word}/*", word, f"{word}/*")
        ] + [
            "images",
            "",
        ]

    def example(self, row: _Row, images: Sequence[ImageSource]) -> Example:
        split, images_set, _, sentence = row.parts
        return Example(
            id=row.id,
            text=row.sentence,
            images=images,
            target=row.target,
            # The pairs of a set share the same eight photographs.
            cluster=f"{split}-{images_set}",
            meta={"group": (split, images_set, sentence)},
        )

    def score(self, prediction: str, example: Example) -> float:
        return label_score(prediction, example, self.labels)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """`consistency`: the share of sentences that are right for every pair of a set, as in the
        official script.

        Over the examples given: a part of a split lacks some pairs, which makes it easier.
        """
        groups = defaultdict(list)
        for score, example in zip(scores, examples, strict=True):
            groups[example.meta["group"]].append(score == 1)
        return {"consistency": round(100 * sum(map(all, groups.values())) / len(groups), 2)}

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write the CSV that NLVR2's metrics.py takes."""
        ids = check_ids(predictions, examples)
        check_labels(predictions, self.labels)
        with replacing(path) as file:
            file.writelines(f"{name},{predictions[name]}\n" for name in ids)
