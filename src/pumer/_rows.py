"""Append rows to a CSV file: complete ones, from any number of processes, checked first."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from pumer._files import check_file, lock, real_file


def append_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, created if needed; existing complete rows never change.

    A last row that was cut off by a kill or a full disk is removed first. If the new rows cannot be
    written, none is.

    Raises:
        ValueError: if the rows' columns differ from each other or from the file's.
        OSError: if they cannot be written.
    """
    if not rows:
        return
    columns = list(rows[0])
    if any(list(row) != columns for row in rows):
        raise ValueError("rows of one table have the same columns in the same order")
    target = real_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as file:
        text = file.read()
        _check_header(path, text, columns)
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        if not finished_rows(text.decode("utf-8")):
            writer.writeheader()
        writer.writerows(rows)
        _add(file, text, table.getvalue().encode())


def mend_rows(path: str | Path) -> None:
    """Remove a last row that was cut off by a kill or a full disk."""
    target = real_file(path)
    if target.exists():
        with _locked(target) as file:
            _add(file, file.read(), b"")


@contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """Open a file for reading and writing, created if needed, and lock it against other writers."""
    with FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
        lock(file, wait=True)
        try:
            yield file
        except OSError as error:
            error.filename = str(path)
            raise


def _add(file: FileIO, text: bytes, rows: bytes) -> None:
    """Append to the complete rows of an open file; on failure nothing is added."""
    finished = finished_rows(text.decode("utf-8")).encode()
    start = min(len(text), len(finished))
    content = finished[start:] + rows
    if not content and start == len(text):
        return
    file.truncate(start)
    file.seek(start)
    try:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise


class RowFile:
    """A CSV file that rows will be added to, checked before there are any; without a path it takes
    none.

    Args:
        path: of the file.
        columns: of every row.

    Raises:
        ValueError: if the file has other columns, or cannot be written.
    """

    def __init__(self, path: str | Path | None, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        if path is None:
            return
        check_file(path)
        if (target := real_file(path)).exists():
            _check_header(path, target.read_bytes(), columns)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; see `append_rows`."""
        assert all(list(row) == self.columns for row in rows), "what was checked is what is written"
        if self.path is not None:
            append_rows(self.path, rows)


def finished_rows(text: str) -> str:
    """The text of a CSV file without a last row that ends too early; one that lacks nothing but its
    end counts."""
    end = text.rfind("\n") + 1
    while text.count('"', 0, end) % 2:  # this end of a line lies within a cell
        end = text.rfind("\n", 0, end - 1) + 1
    if not end or end == len(text):
        return text[:end]
    columns = next(csv.reader(io.StringIO(text)), [])
    last = next(csv.reader(io.StringIO(text[end:])), []) if text.count('"', end) % 2 == 0 else []
    return f"{text}\n" if len(last) == len(columns) else text[:end]


def _check_header(path: str | Path, content: bytes, columns: Sequence[str]) -> None:
    try:
        header = next(csv.reader([finished_rows(content.decode("utf-8")).partition("\n")[0]]), [])
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no table of rows: name a new file") from None
    if header and header != list(columns):
        other = sorted(set(header) ^ set(columns)) or ["their order"]
        raise ValueError(
            f"{path} has other columns (differing in {', '.join(other)}): name a new file"
        )
