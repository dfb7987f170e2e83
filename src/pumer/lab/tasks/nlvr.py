"""NLVR: is a sentence true of an image of three boxes?

Suhr et al., "A Corpus of Natural Language for Visual Reasoning", ACL 2017 (github.com/lil-lab/nlvr,
CC-BY-4.0).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumer._files import replacing
from pumer.lab.data.parquet import ImageTable
from pumer.lab.tasks.base import Example, Task, check_ids, count_of, label_score

_COLUMNS = ("id", "example_id", "presentation", "directory", "k", "sentence", "label")
_BOX_ORDERS = set(range(6))


@dataclass(frozen=True)
class NLVR(Task):
    """NLVR packed in Parquet files: all three boxes as one image, the sentence, false (0) or true
    (1).

    Args:
        root: the folder of the Parquet files.
        train_file: what "train" and "validation" are cut from: 1,000 examples in all six box
            orders. With the official train.json, `attach_train.py`, which lies with the files,
            makes `train_full_k0.parquet` of all 12,410 examples: name it here.
        held_out: directories of the train file that make up "validation". Whole directories,
            because the images of a sentence and their box orders lie in one; rows drawn at random
            would put the same image on both sides.

    Splits: "train", "validation", or the name of a file without its ending: "dev_k0" (each image
    once), "dev_all6" (in all six box orders).
    """

    name = "nlvr"
    loss_kind = "class"
    labels = ("false", "true")
    root: str | Path
    train_file: str = "train_all6.parquet"
    held_out: tuple[int, ...] = tuple(range(72, 80))

    def examples(self, split: str) -> Sequence[Example]:
        """Rows of a split, with every box order as an example of its own."""
        cut = split in ("train", "validation")
        path = Path(self.root) / (self.train_file if cut else f"{split}.parquet")
        table = ImageTable(path, _COLUMNS)
        column = table.columns
        rows: Sequence[int] = range(len(table))
        if cut:
            rows = [
                i
                for i in rows
                if (column["directory"][i] in self.held_out) == (split == "validation")
            ]
        ids = [column["id"][i] for i in rows]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"{path}: {len(ids) - len(set(ids))} of {len(ids)} rows repeat an id; remove them."
            )
        # Without a label an example can be predicted; without a sentence, or to train on, it is no
        # use.
        for name in ("sentence", "label") if cut else ("sentence",):
            missing = [column["id"][i] for i in rows if column[name][i] is None]
            if missing:
                raise ValueError(
                    f"{path}: {count_of(missing, len(ids), 'rows')} have no {name}; attach the "
                    "official file."
                )
        return _Examples(table, rows)

    def score(self, prediction: str, example: Example) -> float:
        return label_score(prediction, example, self.labels)

    def details(self, scores: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
        """`consistency`: the share of presentations that are right in all six box orders.

        Only where all six are among the examples; over fewer the number would not be comparable.
        """
        orders, right = defaultdict(set), defaultdict(list)
        for score, example in zip(scores, examples, strict=True):
            orders[example.meta["example_id"]].add(example.meta["k"])
            right[example.cluster].append(score == 1)
        if any(box_orders != _BOX_ORDERS for box_orders in orders.values()):
            return {}
        return {"consistency": round(100 * sum(map(all, right.values())) / len(right), 2)}

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write the CSV that NLVR's metrics_images.py takes; it wants every image in all six box
        orders."""
        ids = check_ids(predictions, examples)
        invalid_names = [name for name, label in predictions.items() if label not in self.labels]
        if invalid_names:
            raise ValueError(
                f"{count_of(invalid_names, len(predictions), 'predictions')} are neither true "
                "nor false."
            )
        with replacing(path) as file:
            file.writelines(f"{name}.png,{predictions[name]}\n" for name in ids)


class _Examples(Sequence[Example]):
    """Some rows of a file."""

    def __init__(self, table: ImageTable, rows: Sequence[int]):
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def targets(self) -> Iterator[Any]:
        """The target of every example, for which no image is read."""
        labels = self._table.columns["label"]
        return (labels[row] for row in self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        row = self._table[self._rows[index]]
        return Example(
            id=row["id"],
            text=row["sentence"],
            images=(row["image"],),
            target=row["label"],
            cluster=row["presentation"],
            meta={name: row[name] for name in ("example_id", "directory", "k")},
        )
