"""A matrix of scores in chunks: which pairs each contains, and its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pumer._files import LOCK, file_digest, replacing

FORMAT = 1
"""Version of what a folder of scores holds."""


@dataclass(frozen=True)
class Chunks:
    """Blocks of images times blocks of texts, numbered from 0, text blocks first.

    Args:
        images: rows of the matrix.
        texts: its columns.
        chunk_images: rows of a chunk; the last ones may have fewer.
        chunk_texts: columns of a chunk; the last ones may have fewer.

    Raises:
        ValueError: if any of them is below 1.

    >>> chunks = Chunks(images=3, texts=5, chunk_images=2, chunk_texts=4)
    >>> len(chunks), chunks[3]
    (4, (slice(2, 3, None), slice(4, 5, None)))
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

    def __getitem__(self, chunk_index: int) -> tuple[slice, slice]:
        """Images and texts of a chunk."""
        if not 0 <= chunk_index < len(self):
            raise IndexError(f"there are {len(self)} chunks, none is numbered {chunk_index}")
        row, column = divmod(chunk_index, -(-self.texts // self.chunk_texts))
        first_image, first_text = row * self.chunk_images, column * self.chunk_texts
        bottom, right = (
            min(first_image + self.chunk_images, self.images),
            min(first_text + self.chunk_texts, self.texts),
        )
        return slice(first_image, bottom), slice(first_text, right)

    def shape(self, chunk_index: int) -> tuple[int, int]:
        """Rows and columns of a chunk."""
        rows, columns = self[chunk_index]
        return rows.stop - rows.start, columns.stop - columns.start


class Matrix:
    """Scores in a folder: `manifest.json`, a file for each finished chunk, and finally only
    `scores.npy`.

    A killed process leaves only complete chunks, and a file that was damaged later is computed
    again. Any number of processes may write chunks at the same time.
    """

    def __init__(self, folder: str | Path, chunks: Chunks, fingerprint: dict[str, Any]) -> None:
        """Start or resume a matrix; raises ValueError if the folder holds anything else."""
        self.folder, self.chunks = Path(folder), chunks
        self._parts = self.folder / "chunks"
        manifest = {"format": FORMAT, **fingerprint}
        file = self.folder / "manifest.json"
        if file.is_file():
            self._compare(file, json.loads(json.dumps(manifest)))
        elif self.folder.exists() and not {entry.name for entry in self.folder.iterdir()} <= {
            self._parts.name,
            LOCK,
        }:
            raise ValueError(f"{self.folder} holds files that are no scores: give another folder")
        self._parts.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            with replacing(file) as stream:
                stream.write(json.dumps(manifest, indent=2) + "\n")
        self.damaged = self.file.is_file() and not self._intact()
        """Whether the file of all scores was there and had changed; it is computed again."""
        if self.damaged:
            self.file.unlink(missing_ok=True)  # another process may have done so
        self._tidy()

    def _compare(self, file: Path, manifest: dict[str, Any]) -> None:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            differing = [name for name in manifest if stored.get(name) != manifest[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): delete {self.folder}, or give another folder"
            ) from error
        if differing:
            raise ValueError(
                f"{self.folder} holds scores of something else (other {', '.join(differing)}): "
                "give another folder, the same settings, or delete it"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Images and texts."""
        return self.chunks.images, self.chunks.texts

    @property
    def _digest(self) -> Path:
        """The digest of the whole matrix, as `sha256sum` writes it."""
        return self.folder / "scores.npy.sha256"

    @property
    def file(self) -> Path:
        """The complete matrix, float32 [images, texts] in NumPy's format."""
        return self.folder / "scores.npy"

    @property
    def complete(self) -> bool:
        """Whether all scores are in one file."""
        return self.file.is_file()

    def missing(self) -> list[int]:
        """The unfinished chunks."""
        if self.complete:
            return []
        return [
            chunk_index
            for chunk_index in range(len(self.chunks))
            if not self._finished(chunk_index)
        ]

    def write(self, chunk_index: int, scores: Tensor) -> None:
        """Write a finished chunk."""
        assert tuple(scores.shape) == self.chunks.shape(chunk_index)
        with replacing(self._part(chunk_index), "wb") as file:
            file.write(scores.numpy().astype("<f4").tobytes())

    def assemble(self) -> None:
        """Join all chunks into one file and delete them."""
        if not self.complete:
            with replacing(self.file, "wb") as file:
                all_scores = np.lib.format.open_memmap(
                    file.name, mode="w+", dtype="<f4", shape=self.shape
                )
                for chunk_index in range(len(self.chunks)):
                    scores = np.fromfile(self._part(chunk_index), dtype="<f4")
                    all_scores[self.chunks[chunk_index]] = scores.reshape(
                        self.chunks.shape(chunk_index)
                    )
                all_scores.flush()
                with replacing(self._digest) as line:  # first, so that scores never lack it
                    line.write(f"{file_digest(Path(file.name)).hex()}  {self.file.name}\n")
        self._tidy()

    def open(self) -> np.ndarray:
        """The complete matrix, memory-mapped copy-on-write."""
        return np.load(self.file, mmap_mode="c")

    def _part(self, chunk_index: int) -> Path:
        return self._parts / f"{chunk_index:08d}.f4"

    def _finished(self, chunk_index: int) -> bool:
        rows, columns = self.chunks.shape(chunk_index)
        part = self._part(chunk_index)
        return part.is_file() and part.stat().st_size == 4 * rows * columns

    def _intact(self) -> bool:
        """Whether the file of all scores has its full length and its digest."""
        try:
            scores = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        if scores.shape != self.shape or scores.dtype != np.dtype("<f4"):
            return False
        if not self._digest.is_file():  # written by an earlier version
            return True
        return self._digest.read_text(encoding="utf-8").split()[:1] == [
            file_digest(self.file).hex()
        ]

    def _tidy(self) -> None:
        """Delete leftover chunks of a complete matrix."""
        if self.complete:
            shutil.rmtree(self._parts, ignore_errors=True)
