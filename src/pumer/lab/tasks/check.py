"""Compare a task's official files and images with what was published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pumer.lab import tasks
from pumer.lab.tasks.files import FileTask, MissingFileError, present, undecodable, wanted
from pumer.lab.tasks.retrieval import DATASETS, Retrieval


@dataclass(frozen=True)
class SplitCheck:
    """What was found of a split.

    `published` is empty for unofficial splits. `counts` is empty if the files cannot be read; then
    `problem` says why, and `absent` whether they just do not exist. `missing` are keys of images
    that `store` lacks, `broken` the reasons why images cannot be decoded, if that was tried.
    """

    name: str
    published: Mapping[str, int]
    counts: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    absent: bool = False
    store: str = ""
    missing: Sequence[str] = ()
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that the files name can be read; they may still hold less than was
        published."""
        return not (self.problem or self.missing or self.broken)


def check_files(
    name: str,
    root: str | Path,
    images: str | Path | None = None,
    decode: bool = False,
    show_progress: bool = False,
) -> list[SplitCheck]:
    """Check every split of a task, official ones and others that exist; `decode` also opens every
    image.

    Raises:
        ValueError: for a task without official files, a `root` that is not a folder, and `images`
            that `open_store` does not support.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{root} is no folder; give the one with the official files.")
    checks = []
    for task in _tasks(name, root, images):
        for split in task.splits():
            title = f"{task.dataset} {split}" if isinstance(task, Retrieval) else split
            published = task.published.get(split, {})
            checks.append(_check(task, split, title, published, decode, show_progress))
    return checks


def _tasks(name: str, root: str | Path, images: str | Path | None) -> Iterator[FileTask]:
    task_class = tasks.get(name)
    if not issubclass(task_class, FileTask):
        task_names = [
            task_name
            for task_name in tasks.list_tasks()
            if issubclass(tasks.get(task_name), FileTask)
        ]
        raise ValueError(
            f"{name} is not read from official files; there are {', '.join(task_names)}."
        )
    if not issubclass(task_class, Retrieval):
        yield task_class(root, images=images)
        return
    both = [task_class(root, images=images, dataset=dataset, restval=False) for dataset in DATASETS]
    yield from [task for task in both if task.file.is_file()] or both


def _check(
    task: FileTask,
    split: str,
    title: str,
    published: Mapping[str, int],
    decode: bool,
    show_progress: bool,
) -> SplitCheck:
    try:
        rows = task.read(split)
    except ValueError as error:
        return SplitCheck(
            title, published, problem=str(error), absent=isinstance(error, MissingFileError)
        )
    store, keys = task.store(split), wanted(task, rows)
    missing = store.absent(keys)
    broken = undecodable(store, present(keys, missing), show_progress) if decode else {}
    return SplitCheck(
        title, published, task.count(rows), store=str(store), missing=missing, broken=broken
    )
