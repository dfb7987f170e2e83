"""Images by name, wherever they lie: in folders, in an LMDB file as PuMer writes it, in Parquet files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pumer._extras import need
from pumer.data.images import BrokenImageError, ImageSource

SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageStore(ABC):
    """Encoded images by key, the image's file name without its ending; `open_image` decodes what it gives.

    Stores can be pickled and survive a fork, so that a data loader's workers can use them.
    """

    path: Path

    @abstractmethod
    def keys(self) -> AbstractSet[str]:
        """Of all the images that are there."""

    @abstractmethod
    def __getitem__(self, key: str) -> ImageSource:
        """The encoded image; raises BrokenImageError (a ValueError) naming store and key where there is none."""

    def __str__(self) -> str:
        return str(self.path)

    def select(self, keys: Sequence[str]) -> StoredImages:
        """Some of the images, in this order; none is read before it is asked for."""
        return StoredImages(self, keys)

    def missing(self, key: str) -> BrokenImageError:
        """What to raise for a key that is not there."""
        return BrokenImageError(f"{self} has no image {key!r}; add it, or give another folder, LMDB or Parquet file.")


@dataclass(frozen=True)
class StoredImages(Sequence[ImageSource]):
    """Images of a store by their keys; an index reads one, a slice reads none."""

    store: ImageStore
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StoredImages(self.store, self.keys[index])
        return self.store[self.keys[index]]


def open_store(path: str | Path, places: Sequence[str] = ("",)) -> ImageStore:
    """The images under `path`: an LMDB file (*.lmdb), a Parquet file or a folder of such, or a folder of images.

    `places` are the folders below an image folder that are looked into, as glob patterns, "" for itself; which
    of them are there does not matter.
    Raises ValueError for a path that does not exist, a file that is of neither kind, and a broken file.
    """
    path = Path(path)
    if path.suffix == ".lmdb" and path.is_file():
        return LMDB(path)
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(path)
    if path.is_dir():
        return Parquet(path) if any(path.glob("*.parquet")) else Folder(path, places)
    what = "is no .lmdb or .parquet file" if path.exists() else "does not exist"
    raise ValueError(f"{path} {what}; give a folder of images, an LMDB file or Parquet files.")


class Folder(ImageStore):
    """Image files (.jpg, .jpeg, .png), found in one listing of each folder rather than by a look at each file.

    Where two files have the same key, the one in the earlier place, then the earlier name, is taken.
    """

    def __init__(self, path: Path, places: Sequence[str] = ("",)):
        self.path, self._places = path, places
        self._files: dict[str, str] = {}
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for file in sorted(entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES)):
                    self._files.setdefault(Path(file).stem, file)

    def _folders(self) -> Iterator[Path]:
        for place in self._places:
            found = sorted(self.path.glob(place)) if place else [self.path]
            yield from (folder for folder in found if folder.is_dir())

    def __str__(self) -> str:
        below = [place for place in self._places if place]
        return f"{self.path} ({', '.join(below)})" if below else str(self.path)

    def keys(self) -> AbstractSet[str]:
        return self._files.keys()

    def __getitem__(self, key: str) -> ImageSource:
        if key not in self._files:
            raise self.missing(key)
        return Path(self._files[key])


class LMDB(ImageStore):
    """An LMDB file of encoded images by key, as PuMer's writer makes it (a file, not a folder).

    Raises ValueError without the `lmdb` package and for a file that is no LMDB file.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        _environment(self.path)

    def keys(self) -> AbstractSet[str]:
        with _environment(self.path).begin() as transaction:
            return {key.decode() for key in transaction.cursor().iternext(values=False)}

    def __getitem__(self, key: str) -> ImageSource:
        with _environment(self.path).begin() as transaction:
            image: bytes | None = transaction.get(key.encode())
        if image is None:
            raise self.missing(key)
        return image


@cache
def _environment(path: Path) -> Any:
    """The opened file: one for each process, as LMDB demands.

    A forked worker goes on with its parent's: opened without locks and only to read, it holds nothing that
    belongs to one process.
    """
    need(f"reading {path}", "data", "lmdb")
    import lmdb

    try:
        return lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be read as an LMDB file: {error}; make it again.") from error


class Parquet(ImageStore):
    """Parquet files with a column `image`: the encoded bytes, or Hugging Face's struct of `bytes` and `path`.

    The key stands in a column `key`; without one it is the file name in `image.path`. Only the keys are held.
    An image is read with its whole row group, of which the last few are kept, so write small ones
    (`row_group_size=100`); to read in random order, LMDB is faster.
    Raises ValueError for files that are missing, no Parquet files or without these columns, for rows without a
    key, and for keys that repeat.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, tuple[Path, int, int]] = {}
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            try:
                self._index(file)
            except pa.ArrowException as error:
                raise ValueError(f"{file} cannot be read as a Parquet file: {error}; fetch it again.") from error

    def _index(self, file: Path) -> None:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        if "image" not in schema.names:
            raise ValueError(f"{file} has no column image, only {', '.join(schema.names)}; is it the right file?")
        image = schema.field("image").type
        if "key" not in schema.names and not (pa.types.is_struct(image) and image.get_field_index("path") >= 0):
            raise ValueError(f"{file} has neither a column key nor image.path; add a column of the images' names.")
        for group in range(parquet.num_row_groups):
            if "key" in schema.names:
                keys = parquet.read_row_group(group, columns=["key"])["key"].to_pylist()
            else:
                paths = pc.struct_field(parquet.read_row_group(group, columns=["image.path"])["image"], "path")
                keys = [path and Path(path).stem for path in paths.to_pylist()]
            for row, key in enumerate(keys):
                if not key:
                    raise ValueError(f"{file}: row {row} of row group {group} has no key; name the image.")
                if key in self._rows:
                    raise ValueError(f"{file}: key {key!r} repeats; keep one image of each.")
                self._rows[key] = (file, group, row)

    def keys(self) -> AbstractSet[str]:
        return self._rows.keys()

    def __getitem__(self, key: str) -> ImageSource:
        if key not in self._rows:
            raise self.missing(key)
        file, group, row = self._rows[key]
        image = _row_group(file, group)[row].as_py()
        image = image["bytes"] if isinstance(image, dict) else image
        if image is None:
            raise BrokenImageError(
                f"{file} has no bytes for the image {key!r}; store the images, not only their paths."
            )
        return image


@lru_cache(maxsize=4)
def _row_group(file: Path, group: int) -> pa.ChunkedArray:
    return pq.ParquetFile(file).read_row_group(group, columns=["image"], use_threads=False)["image"]
