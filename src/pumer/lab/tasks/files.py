"""Shared by tasks with official files: rows with line numbers, images found by name."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

from rich.progress import track

from pumer.lab.data.image_store import ImageStore, open_store
from pumer.lab.data.images import BrokenImageError, ImageSource, open_image
from pumer.lab.tasks.base import Example, Task, count_of

Skip = Literal["none", "missing", "broken"]
Exif = Literal["ignore", "apply"]


class MissingFileError(ValueError):
    """An official file that does not exist, as opposed to a broken one.

    Args:
        path: of the file.
        hint: what its folder contains, or where to get it.
    """

    def __init__(self, path: Path, hint: str):
        folder = path.parent
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            hint = f"{folder} {what}, set the task's root to the folder of its files"
        super().__init__(f"{path} does not exist; {hint}.")


@dataclass(frozen=True)
class FileTask(Task):
    """A benchmark in its official files.

    Args:
        root: the folder of the files.
        images: where the images are: a folder in the official layout or of the images themselves,
            an LMDB file as PuMer writes it, a Parquet file or a folder of such
            (`pumer.lab.data.image_store`); default `root`.
        skip: examples to skip with a warning instead of an error: "none"; "missing", those whose
            images do not exist; "broken", also those whose images cannot be decoded, for which
            every image is opened once.
        exif: "apply" rotates images by their EXIF orientation, "ignore" takes the pixels as stored.
            The pipelines of ViLT, METER and PuMer ignore it, so published checkpoints and results
            are for such images; use "apply" for your own photographs.
    """

    root: str | Path
    images: str | Path | None = field(default=None, kw_only=True)
    skip: Skip = field(default="none", kw_only=True)
    exif: Exif = field(default="ignore", kw_only=True)

    split_files: ClassVar[Sequence[str]] = ()
    """Names of files that only a split of this task has, `{}` for its name; NLVR2's fit any."""

    @property
    @abstractmethod
    def published(self) -> Mapping[str, Mapping[str, int]]:
        """Numbers of items in the published splits, by the names that `count` uses."""

    @abstractmethod
    def read(self, split: str) -> Sequence[Any]:
        """The rows of a split, one per example; raises ValueError for missing or wrong files."""

    @abstractmethod
    def keys(self, row: Any) -> tuple[str, ...]:
        """The keys of a row's images."""

    @abstractmethod
    def places(self, split: str) -> Sequence[str]:
        """Folders below `images` in the official layout, as glob patterns."""

    @abstractmethod
    def example(self, row: Any, images: Sequence[ImageSource]) -> Example:
        """The example that a row describes."""

    def splits(self) -> list[str]:
        """The published splits and others that exist; only the latter if no published one does."""
        there = set[str]()
        for pattern in self.split_files:
            before, after = pattern.split("{}")
            names = (path.name for path in Path(self.root).glob(pattern.format("*")))
            there |= {name[len(before) : len(name) - len(after)] for name in names}
        others = sorted(there - self.published.keys())
        return others if others and there.isdisjoint(self.published) else [*self.published, *others]

    def count(self, rows: Sequence[Any]) -> dict[str, int]:
        """Numbers of items in a split."""
        return {"examples": len(rows), "images": len(wanted(self, rows))}

    def store(self, split: str) -> ImageStore:
        """Where a split's images are."""
        if self.exif not in get_args(Exif):
            raise ValueError(f"exif is {self.exif!r}; it is one of {', '.join(get_args(Exif))}.")
        store = open_store(self.images or self.root, self.places(split))
        store.upright = self.exif == "apply"
        return store

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split whose images can be used, see `skip`."""
        rows, store = self.read(split), self.store(split)
        return FileExamples(self, usable(self, rows, store), store)


class FileExamples(Sequence[Example]):
    """The examples of a split in file order, created on access."""

    def __init__(self, task: FileTask, rows: Sequence[Any], store: ImageStore):
        self._task, self._rows, self._store = task, rows, store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        row = self._rows[index]
        return self._task.example(row, self._store.select(self._task.keys(row)))

    def targets(self) -> Iterator[Any]:
        """The target of every example, without reading images."""
        return (self._task.example(row, ()).target for row in self._rows)


def wanted(task: FileTask, rows: Iterable[Any]) -> list[str]:
    """The keys of all images that rows use, each once, in order."""
    return list(dict.fromkeys(key for row in rows for key in task.keys(row)))


def undecodable(
    store: ImageStore, keys: Sequence[str], show_progress: bool = False
) -> dict[str, str]:
    """The reason for each existing image that cannot be decoded; opens all of them."""
    reasons = {}
    for key in track(keys, "opening images", disable=not show_progress):
        try:
            open_image(store[key], name=key)
        except BrokenImageError as error:
            reasons[key] = str(error)
    return reasons


def present(keys: Iterable[str], absent: Iterable[str]) -> list[str]:
    """The keys without those that are absent, in their order."""
    without = set(absent)
    return [key for key in keys if key not in without]


def usable(task: FileTask, rows: Sequence[Any], store: ImageStore) -> Sequence[Any]:
    """The rows whose images can be used, by `task.skip`; raises ValueError if none is left."""
    if task.skip not in get_args(Skip):
        raise ValueError(f"skip is {task.skip!r}; it is one of {', '.join(get_args(Skip))}.")
    keys = wanted(task, rows)
    bad = absent = store.absent(keys)
    if bad and task.skip == "none":
        raise ValueError(
            f"{count_of(bad, len(keys), 'images')} are not in {store}; set images to their "
            'folder, or skip to "missing" to skip their examples.'
        )
    if task.skip == "broken":
        bad = absent + list(undecodable(store, present(keys, absent)))
    if not bad:
        return rows
    without = set(bad)
    usable_rows = [row for row in rows if not without.intersection(task.keys(row))]
    if not usable_rows:
        raise ValueError(
            f"{count_of(bad, len(keys), 'images')} are missing or broken in {store}: no example is "
            "left."
        )
    warnings.warn(
        f"{len(rows) - len(usable_rows)} of {len(rows)} examples are left out: "
        f"{count_of(bad, len(keys), 'images')} are missing or broken in {store}",
        stacklevel=3,
    )
    return usable_rows


class _Row(Protocol):
    @property
    def id(self) -> int | str: ...


R = TypeVar("R", bound=_Row)


def read_lines(path: Path, parse: Callable[[Any], R], source: str) -> list[R]:
    """The rows of a JSON-lines file; see `read_rows`. `source` says where to get the file."""
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        present = ", ".join(there) or f"no {path.suffix} file"
        raise MissingFileError(path, f"{path.parent} has {present}. The files are at {source}")
    with path.open("rb") as file:
        lines = (
            (f"{path}:{line_number}", line)
            for line_number, line in enumerate(file, 1)
            if line.strip()
        )
        return read_rows(lines, lambda line: parse(_json(line)))


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON, {error.msg} at character {error.pos}") from error


def read_rows(items: Iterable[tuple[str, Any]], parse: Callable[[Any], R]) -> list[R]:
    """Parse items, each of which comes with its place in the file.

    Raises:
        ValueError: counting all broken items and naming the first few with their places: those for
            which `parse` raises ValueError, and those that repeat an `id`.
    """
    rows: list[R] = []
    places: dict[int | str, str] = {}
    problems = []
    for row_place, item in items:
        try:
            row = parse(item)
        except ValueError as error:
            problems.append(f"{row_place}: {error}")
            continue
        if row.id in places:
            problems.append(f"{row_place}: id {row.id} repeats that of {places[row.id]}")
            continue
        places[row.id] = row_place
        rows.append(row)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        total = len(rows) + len(problems)
        raise ValueError(
            f"{len(problems)} of {total} rows are broken; fix or remove them. "
            f"{'; '.join(problems[:5])}{more}"
        )
    return rows


def strings(row: Any, *names: str) -> tuple[str, ...]:
    """Text fields of a JSON object; raises ValueError for one that is missing, not a string or
    blank."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(
                f"{name} is {row[name]!r}, not a text" if name in row else f"there is no {name}"
            )
    return tuple(row[name] for name in names)


T = TypeVar("T", bound="_Labelled")


class _Labelled(_Row, Protocol):
    @property
    def target(self) -> int | None: ...


def all_or_none_labelled(rows: list[T], path: Path) -> list[T]:
    """The rows, if every one has a label, or none has: a test set to predict.

    Raises:
        ValueError: naming unlabelled rows among labelled ones.
    """
    without = [row.id for row in rows if row.target is None]
    if 0 < len(without) < len(rows):
        raise ValueError(
            f"{path}: {count_of(without, len(rows), 'rows')} have no label; add them, or "
            "remove the rows."
        )
    return rows


def label_of(row: Mapping[str, Any], name: str, labels: Sequence[str]) -> int | None:
    """The index of a row's label, None if it has none; raises ValueError for an unknown label."""
    if row.get(name) is None:
        return None
    (label,) = strings(row, name)
    return one_of(label, labels)


def one_of(value: str, labels: Sequence[str]) -> int:
    """The index of a label; raises ValueError for an unknown one."""
    if value not in labels:
        raise ValueError(f"label {value!r} is none of {', '.join(labels)}")
    return labels.index(value)
