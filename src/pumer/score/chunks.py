"""A matrix of scores in chunks: which pairs each holds, and how they lie on disk."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

FORMAT = 1
"""Version of what a folder of scores holds."""


@dataclass(frozen=True)
class Chunks:
    """Blocks of images times blocks of texts, numbered from 0, all texts of a block of images first.

    Args:
        images: rows of the matrix.
        texts: its columns.
        chunk_images: rows of a chunk; the last ones may have fewer.
        chunk_texts: columns of a chunk; the last ones may have fewer.

    Raises:
        ValueError: if any of them is below 1.
    """

    images: int
    texts: int
    chunk_images: int
    chunk_texts: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")

    def __len__(self) -> int:
        return -(-self.images // self.chunk_images) * -(-self.texts // self.chunk_texts)

    def __getitem__(self, number: int) -> tuple[slice, slice]:
        """Images and texts of a chunk."""
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} chunks, none is numbered {number}")
        row, column = divmod(number, -(-self.texts // self.chunk_texts))
        first, left = row * self.chunk_images, column * self.chunk_texts
        bottom, right = min(first + self.chunk_images, self.images), min(left + self.chunk_texts, self.texts)
        return slice(first, bottom), slice(left, right)

    def shape(self, number: int) -> tuple[int, int]:
        """Rows and columns of a chunk."""
        rows, columns = self[number]
        return rows.stop - rows.start, columns.stop - columns.start


class Matrix:
    """Scores in a folder: `manifest.json`, a file for each finished chunk, and in the end `scores.npy` alone.

    Every file is written under another name and renamed when it is whole, so what is killed at any moment leaves
    finished chunks and nothing that looks like one. Any number of processes may write chunks at the same time.
    """

    def __init__(self, folder: str | Path, chunks: Chunks, fingerprint: dict[str, Any]) -> None:
        """Start a matrix, or go on with one; raises ValueError if the folder holds anything else."""
        self.folder, self.chunks = Path(folder), chunks
        self._parts = self.folder / "chunks"
        manifest = {"format": FORMAT, **fingerprint}
        file = self.folder / "manifest.json"
        if file.is_file():
            self._compare(file, json.loads(json.dumps(manifest)))
        elif self.folder.exists() and any(entry != self._parts for entry in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds files that are no scores: give another folder")
        self._parts.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            self._replace(file, (json.dumps(manifest, indent=2) + "\n").encode())
        self._tidy()

    def _compare(self, file: Path, manifest: dict[str, Any]) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            differing = [name for name in manifest if found.get(name) != manifest[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete {self.folder}, or give another folder") from error
        if differing:
            raise ValueError(
                f"{self.folder} holds scores of something else (other {', '.join(differing)}): give another folder, "
                "the same settings, or delete it"
            )

    @property
    def file(self) -> Path:
        """The whole matrix, float32 [images, texts] in NumPy's format, there once it is complete."""
        return self.folder / "scores.npy"

    @property
    def complete(self) -> bool:
        """Whether every score is there, in one file."""
        return self.file.is_file()

    def missing(self) -> list[int]:
        """The chunks that are not finished."""
        if self.complete:
            return []
        return [number for number in range(len(self.chunks)) if not self._part(number).is_file()]

    def write(self, number: int, scores: Tensor) -> None:
        """Keep a finished chunk."""
        assert tuple(scores.shape) == self.chunks.shape(number)
        self._replace(self._part(number), scores.numpy().astype("<f4").tobytes())

    def assemble(self) -> None:
        """Make one file of all chunks, which are then deleted; raises ValueError for a damaged one."""
        if not self.complete:
            unfinished = self._parts / f"scores.{os.getpid()}.tmp"
            size = (self.chunks.images, self.chunks.texts)
            whole = np.lib.format.open_memmap(unfinished, mode="w+", dtype="<f4", shape=size)
            for number in range(len(self.chunks)):
                part, shape = self._part(number), self.chunks.shape(number)
                scores = np.fromfile(part, dtype="<f4")
                if len(scores) != shape[0] * shape[1]:
                    raise ValueError(f"{part} is damaged: delete it and start again, it alone is then computed")
                whole[self.chunks[number]] = scores.reshape(shape)
            whole.flush()
            unfinished.replace(self.file)
        self._tidy()

    def open(self) -> np.ndarray:
        """The whole matrix, read from disk where it is looked at; writing to it does not change the file."""
        return np.load(self.file, mmap_mode="c")

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:08d}.f4"

    def _tidy(self) -> None:
        """Delete the chunks of a complete matrix: a process may have been killed before it got to that."""
        if self.complete:
            shutil.rmtree(self._parts, ignore_errors=True)

    def _replace(self, file: Path, content: bytes) -> None:
        unfinished = self._parts / f"{file.name}.{os.getpid()}.tmp"
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # a rename may reach the disk before what was written
        unfinished.replace(file)
