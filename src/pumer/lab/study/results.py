"""The results of a study: an append-only CSV file with one row per point."""

from __future__ import annotations

import base64
import csv
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pumer._rows import finished_rows
from pumer.lab.bench.records import environment
from pumer.lab.study.points import Point, Study
from pumer.lab.train.precision import in_bfloat16

FIGURES = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "gflops",
    "gflops_towers",
    "unreduced_gflops",
    "peak_bytes",
    "unreduced_peak_bytes",
    "average_text",
    "average_image",
    "image_spread",
    "train_seconds",
    "seconds",
)
COLUMNS = (
    "id",
    "setting",
    "study",
    "method",
    "label",
    "reducer",
    "image_size",
    "model",
    "task",
    "split",
    "examples",
    "training",
    "seed",
    "batch_size",
    *FIGURES,
    "tokens",
    "tokens_spread",
    "details",
    "scores",
    *environment(),
)
"""Columns of the results, and those of them that are numbers.

`setting` is the digest of a point without its seed. GFLOPs are per example, `gflops_towers` those
of them that the towers take. `tokens` are the mean (text, image) tokens before the first layer and
after every one, `tokens_spread` their standard deviations over the examples; `average_text`,
`average_image` and `image_spread` are means of those after a layer over all layers. `seconds` is
what the point took, since it was last resumed if it was stopped; for `scores` see `pack_scores`.
"""
SPEED_FIGURES = (
    "examples_per_s",
    "median_s",
    "p20_s",
    "p80_s",
    "x_unreduced",
    "x_low",
    "x_high",
    "overhead",
)
SPEED_COLUMNS = (
    "setting",
    "study",
    "method",
    "label",
    "reducer",
    "image_size",
    "model",
    "batch_size",
    "examples",
    "runs",
    *SPEED_FIGURES,
    *environment(),
)
"""Columns of the speeds, one row per setting, and those of them that are numbers.

`median_s` and its percentiles are of one run over `examples`. `x_unreduced` is the median over the
rounds of the time unreduced by the time of the setting, `x_low` and `x_high` are the 20th and 80th
percentile; `overhead` is the share of the forward that goes into reducing.
"""


def row(
    study: Study,
    point: Point,
    columns: Sequence[str],
    measured: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The row of a point for `append_rows`, with the machine and the `measured` columns."""
    all_values = {
        "id": point.id,
        "setting": point.setting,
        "study": study.name,
        "method": point.method,
        "label": point.label,
        "reducer": json.dumps(point.reducer),
        "image_size": "" if point.image_size is None else point.image_size,
        "model": study.model,
        "task": json.dumps(study.task),
        "split": study.split,
        "training": "" if point.recipe is None else json.dumps(_training(point.recipe)),
        "seed": point.seed,
        "batch_size": study.batch_size,
        **environment(device),
        **measured,
    }
    return {name: all_values[name] for name in columns}


def read_rows(
    path: str | Path, study: str, points: Iterable[Point] | None = None
) -> list[dict[str, Any]]:
    """Read a results file, with figures as floats; empty if there is no file yet.

    An incomplete last row is skipped: it is being written, or was cut off by a kill. Where a point
    was measured again on a later day, because a method was corrected, the later row counts and the
    earlier one stays in the file as a record. So do rows of a method's older defaults, which have
    other ids.

    Args:
        path: of the file.
        study: the name of the study whose rows they have to be.
        points: of the study, if every row has to be of one of them.

    Raises:
        ValueError: for other columns, foreign rows, and two rows of one point and day.
    """
    names = None if points is None else {point.id: (point.method, point.label) for point in points}
    return _read(Path(path), study, COLUMNS, FIGURES, names)


def read_speeds(
    path: str | Path, study: str, points: Iterable[Point] | None = None
) -> list[dict[str, Any]]:
    """The rows of a file of speeds; as `read_rows`."""
    names = (
        None if points is None else {point.setting: (point.method, point.label) for point in points}
    )
    return _read(Path(path), study, SPEED_COLUMNS, SPEED_FIGURES, names)


def check_machine(
    path: Path, rows: Iterable[dict[str, Any]], device: torch.device, parts: Sequence[str]
) -> None:
    """Raise ValueError for rows of another machine, compared by the columns in `parts`."""
    here = environment(device)
    for record in rows:
        other = [
            f"{name} {record[name] or 'none'}" for name in parts if record[name] != str(here[name])
        ]
        if other:
            now = ", ".join(f"{name} {here[name] or 'none'}" for name in parts)
            raise ValueError(
                f"{path} has rows of {', '.join(other)}; here it is {now}. "
                "Use the same --device and threads, or another folder"
            )


def _read(
    path: Path,
    study: str,
    columns: Sequence[str],
    figures: Sequence[str],
    names: Mapping[str, tuple[str, str]] | None,
) -> list[dict[str, Any]]:
    """Read rows keyed by their first column; `names` maps valid keys to (method, label)."""
    if not path.is_file():
        return []
    lines = list(csv.reader(finished_rows(path.read_text(encoding="utf-8")).splitlines()))
    if not lines:
        return []
    if lines[0] != list(columns):
        other = sorted(set(lines[0]) ^ set(columns)) or ["their order"]
        raise ValueError(
            f"{path} has other columns (differing in {', '.join(other)}): name another folder"
        )
    rows: dict[str, dict[str, Any]] = {}
    for line_number, values in enumerate(lines[1:], start=2):
        if not values:
            continue
        line = f"{path}, line {line_number}"
        if len(values) != len(columns):
            raise ValueError(
                f"{line}, has {len(values)} columns, not {len(columns)}: take the line out"
            )
        record = dict(zip(columns, values, strict=True))
        key = record[columns[0]]
        if (
            names is not None
            and key not in names
            and (record["method"], record["label"]) in names.values()
        ):
            continue  # of older defaults
        if record["study"] != study or (names is not None and key not in names):
            raise ValueError(
                f"{line}, is no point of the study {study}: {record['study']}, {record['method']} "
                f"{record['label']}. Take the line out, or name another folder"
            )
        if names is not None and names[key][0] != record["method"]:
            raise ValueError(
                f"{line}: the method {record['method']!r} is called {names[key][0]!r} in the "
                "study: rename one of them"
            )
        if key in rows and record["date"] <= rows[key]["date"]:
            raise ValueError(f"{line}, repeats a point: take one of the two lines out")
        rows[key] = record | {name: _number(record[name], f"{line}: {name}") for name in figures}
    newest: dict[tuple[str, ...], str] = {}
    for record in rows.values():
        newest[_of_point(record)] = max(record["date"], newest.get(_of_point(record), ""))
    return [record for record in rows.values() if record["date"] == newest[_of_point(record)]]


def _of_point(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Key of a row that does not change with a method's defaults."""
    return record["method"], record["label"], str(record.get("seed", ""))


def pack_scores(scores: Sequence[float], clusters: Sequence[Any]) -> str:
    """Scores per cluster as compact text, for paired comparisons of methods; see `unpack_scores`.

    >>> unpack_scores(pack_scores([1.0, 0.0, 0.5], ["a.jpg", "a.jpg", "b.jpg"])).tolist()
    [[1.0, 0.5], [2.0, 1.0]]
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = [names[name] for name in clusters]
    hundredths = np.rint(100 * np.bincount(index, weights=np.asarray(scores, dtype=float)))
    table = np.stack([hundredths, np.bincount(index)]).astype("<u4")
    return base64.b64encode(zlib.compress(table.tobytes(), 9)).decode()


def unpack_scores(text: str) -> np.ndarray:
    """Sum of the scores (0 to 1) and number of examples of every cluster: float64 [2, clusters]."""
    table = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").reshape(2, -1)
    return table / np.array([[100.0], [1.0]])


def _training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The main settings of a training; the others are in the study's file and its recipe."""
    trainer = recipe.get("trainer", {})
    return {
        "task": recipe["task"],
        "distill": bool(recipe.get("distill")),
        "bfloat16": in_bfloat16(trainer),
        **{
            name: trainer[name]
            for name in ("num_train_epochs", "max_steps", "learning_rate")
            if name in trainer
        },
    }


def _number(text: str, where: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(
            f"{where} is {text!r}, which is no number: mend the line, or take it out"
        ) from None
