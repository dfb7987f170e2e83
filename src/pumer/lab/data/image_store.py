"""Images by name, in folders, LMDB or Parquet files."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pumer._extras import need
from pumer.lab.data.images import BrokenImageError, ImageSource, Upright
from pumer.lab.data.parquet import bytes_of, open_parquet, parquet_error

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_KEY = 512
"""LMDB refuses to look for one of so many bytes."""
_COCO = re.compile(r"(COCO_train2014_|COCO_val2014_|COCO_test2015_|)(\d{12})")


def spellings(key: str) -> Iterator[str]:
    """Names that a store may know an image by: its key, its file name, and COCO's names of both
    years.

    COCO puts the split before the image's number in the releases of 2014 and 2015, but not of 2017;
    the numbers are the same.
    """
    yield key
    name = PurePosixPath(key)
    if name.suffix.lower() in SUFFIXES:
        yield str(name.with_suffix(""))
    if name.suffix.lower() in SUFFIXES or name.name != key:
        yield name.stem
    if coco := _COCO.fullmatch(key):
        years = ("", "COCO_train2014_", "COCO_val2014_", "COCO_test2015_")
        yield from (year + coco[2] for year in years if year != coco[1])


class ImageStore(ABC):
    """Encoded images by key, the image's file name without its suffix.

    A key may also be a file's name or path, see `spellings`. `open_image` decodes the result, and
    rotates it by its EXIF data if `upright` is set. Stores can be pickled and forked, so the
    workers of a data loader can use them.
    """

    path: Path
    upright = False

    @abstractmethod
    def keys(self) -> AbstractSet[str]:
        """The keys of all images."""

    @abstractmethod
    def _has(self, name: str) -> bool:
        """Whether there is an image of exactly this name."""

    @abstractmethod
    def _read(self, name: str) -> bytes | Path:
        """The encoded image of exactly this name."""

    def __getitem__(self, key: str) -> ImageSource:
        """The encoded image; raises BrokenImageError (a ValueError) naming store and key if there
        is none."""
        for name in spellings(key):
            if self._has(name):
                return Upright(self._read(name)) if self.upright else self._read(name)
        raise self.missing(key)

    def absent(self, keys: Sequence[str]) -> list[str]:
        """The keys without an image; reads none."""
        return [key for key in keys if not any(map(self._has, spellings(key)))]

    def __str__(self) -> str:
        return str(self.path)

    def select(self, keys: Sequence[str]) -> StoredImages:
        """Some of the images in this order, read on access."""
        return StoredImages(self, keys)

    def missing(self, key: str) -> BrokenImageError:
        """What to raise for a key that is not there."""
        return BrokenImageError(
            f"{self} has no image {key!r}; add it, or give another folder, LMDB or Parquet file."
        )


@dataclass(frozen=True)
class StoredImages(Sequence[ImageSource]):
    """Images of a store by their keys, read on access."""

    store: ImageStore
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StoredImages(self.store, self.keys[index])
        return self.store[self.keys[index]]


def open_store(path: str | Path, places: Sequence[str] = ("",)) -> ImageStore:
    """The images under `path`: LMDB (a file *.lmdb or a folder with data.mdb), a Parquet file or a
    folder of such, or a folder of images.

    `places` are the folders below an image folder that are looked into, as glob patterns, "" for
    itself; which of them are there does not matter. Raises ValueError for a path that does not
    exist, a file that is of neither kind, and a broken file.
    """
    path = Path(path)
    if path.suffix in (".lmdb", ".mdb") and path.is_file():
        return LMDB(path)
    if (path / "data.mdb").is_file():
        return LMDB(path / "data.mdb")
    if path.suffix == ".parquet" and path.is_file():
        return Parquet(path)
    if path.is_dir():
        return Parquet(path) if any(path.glob("*.parquet")) else Folder(path, places)
    what = "is no .lmdb or .parquet file" if path.exists() else "does not exist"
    raise ValueError(f"{path} {what}; give a folder of images, an LMDB file or Parquet files.")


class Folder(ImageStore):
    """Image files, found by listing each folder once.

    Their names end in one of `SUFFIXES`. If two files have the same key, the one in the earlier
    place, then the earlier name, is taken. A key that is a path is resolved below the folder.
    """

    def __init__(self, path: Path, places: Sequence[str] = ("",)):
        self.path, self._places = path, places
        self._files: dict[str, str] = {}
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for file in sorted(
                    entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES)
                ):
                    self._files.setdefault(Path(file).stem, file)

    def _folders(self) -> Iterator[Path]:
        for pattern in self._places:
            folders = sorted(self.path.glob(pattern)) if pattern else [self.path]
            yield from (folder for folder in folders if folder.is_dir())

    def __str__(self) -> str:
        below = [pattern for pattern in self._places if pattern]
        return f"{self.path} ({', '.join(below)})" if below else str(self.path)

    def keys(self) -> AbstractSet[str]:
        return self._files.keys()

    def _has(self, name: str) -> bool:
        return name in self._files or self._below(name) is not None

    def _read(self, name: str) -> bytes | Path:
        return Path(self._files.get(name) or self.path / str(self._below(name)))

    def _below(self, name: str) -> PurePosixPath | None:
        """The file of that path, which must be inside the folder."""
        path = PurePosixPath(name)
        if path.suffix.lower() not in SUFFIXES or path.is_absolute() or ".." in path.parts:
            return None
        return path if (self.path / path).is_file() else None


class LMDB(ImageStore):
    """An LMDB file of encoded images by key, as PuMer's writer makes it; `data.mdb` of a folder.

    Raises ValueError without the `lmdb` package and for a file that is no LMDB file, or cut off.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        _environment(self.path)

    def keys(self) -> AbstractSet[str]:
        with _environment(self.path).begin() as transaction:
            keys = transaction.cursor().iternext(values=False)
            return {key.decode(errors="replace") for key in keys}

    def _has(self, name: str) -> bool:
        key = name.encode()
        if not 0 < len(key) < _LONGEST_KEY:
            return False
        with _environment(self.path).begin() as transaction:
            return bool(transaction.cursor().set_key(key))

    def _read(self, name: str) -> bytes | Path:
        with _environment(self.path).begin() as transaction:
            return bytes(transaction.get(name.encode()))


@cache
def _environment(path: Path) -> Any:
    """The opened file: one for each process, as LMDB demands.

    A forked worker goes on with its parent's: opened without locks and only to read, it holds
    nothing that belongs to one process.
    """
    need(f"reading {path}", "data", "lmdb")
    import lmdb

    try:
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(
            f"{path} cannot be read as an LMDB file: {error}; make it again."
        ) from error
    # Memory-mapped: touching a page beyond the end of a truncated file would kill the process.
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if path.stat().st_size < needed:
        environment.close()
        raise ValueError(
            f"{path} cannot be read as an LMDB file: it ends after {path.stat().st_size:,} of "
            f"{needed:,} bytes; copy it again."
        )
    return environment


class Parquet(ImageStore):
    """Parquet files with a column `image`: the encoded bytes, or Hugging Face's struct of `bytes`
    and `path`.

    The key stands in a column `key`; without one it is the file name in `image.path`. Only the keys
    are held. An image is read with its whole row group, of which the last few are kept, so write
    small ones (`row_group_size=100`); to read in random order, LMDB is faster. Raises ValueError
    for files that are missing, damaged, no Parquet files or without these columns, for rows without
    a key, and for keys that repeat.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, tuple[Path, int, int]] = {}
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            with parquet_error(file):
                self._index(file)

    def _index(self, file: Path) -> None:
        parquet = open_parquet(file)
        schema = parquet.schema_arrow
        image = bytes_of(schema, file)
        if "key" not in schema.names and not (
            pa.types.is_struct(image) and image.get_field_index("path") >= 0
        ):
            raise ValueError(
                f"{file} has neither a column key nor image.path; add a column of the images' "
                "names."
            )
        for group in range(parquet.num_row_groups):
            if "key" in schema.names:
                keys = parquet.read_row_group(group, columns=["key"])["key"].to_pylist()
            else:
                paths = pc.struct_field(
                    parquet.read_row_group(group, columns=["image.path"])["image"], "path"
                )
                keys = [path and Path(path).stem for path in paths.to_pylist()]
            for row, key in enumerate(keys):
                if not key:
                    raise ValueError(
                        f"{file}: row {row} of row group {group} has no key; name the image."
                    )
                if key in self._rows:
                    raise ValueError(f"{file}: key {key!r} repeats; keep one image of each.")
                self._rows[key] = (file, group, row)

    def keys(self) -> AbstractSet[str]:
        return self._rows.keys()

    def _has(self, name: str) -> bool:
        return name in self._rows

    def _read(self, name: str) -> bytes | Path:
        file, group, row = self._rows[name]
        with parquet_error(file, BrokenImageError):
            image = _row_group(file, group)[row].as_py()
        image = image["bytes"] if isinstance(image, dict) else image
        if image is None:
            raise BrokenImageError(
                f"{file} has no bytes for the image {name!r}; store the images, not only their "
                "paths."
            )
        return bytes(image)


@lru_cache(maxsize=4)
def _row_group(file: Path, group: int) -> pa.ChunkedArray:
    return open_parquet(file).read_row_group(group, columns=["image"], use_threads=False)["image"]
