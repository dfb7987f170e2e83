"""Parquet files with an image column in Hugging Face's format, with random access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file, verifying page checksums where there are any."""
    return pq.ParquetFile(path, page_checksum_verification=True)


@contextmanager
def parquet_error(path: Path, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn Arrow's errors inside the block into one line of this type."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise kind(f"{path} cannot be read as a Parquet file: {reason}; fetch it again.") from error


def bytes_of(schema: pa.Schema, path: Path) -> pa.DataType:
    """The type of the column `image`, if it holds encoded images.

    Raises ValueError for one that is missing, or holds anything else: file names are not followed.
    """
    if "image" not in schema.names:
        columns = ", ".join(schema.names)
        raise ValueError(f"{path} has no column image, only {columns}; is it the right file?")
    column = schema.field("image").type
    content = column
    if pa.types.is_struct(column):
        index = column.get_field_index("bytes")
        content = column.field(index).type if index >= 0 else pa.string()
    kinds = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null  # null: of no rows
    if not any(is_type(content) for is_type in kinds):
        raise ValueError(
            f"{path}: the column image is of type {column}; store the images' bytes in it, not "
            "their names."
        )
    return column


def read_texts(path: Path) -> list[str]:
    """The column `sentence` or `caption` of a Parquet file, without empty texts; raises ValueError
    if it has none."""
    with parquet_error(path):
        file = open_parquet(path)
        names = file.schema_arrow.names
        column = next((name for name in ("sentence", "caption") if name in names), None)
        if column is None:
            raise ValueError(f"{path} has no column sentence or caption, only {', '.join(names)}")
        return [text for text in file.read(columns=[column])[column].to_pylist() if text]


class ImageTable(Sequence[dict[str, Any]]):
    """Rows of a Parquet file with an `image` column: encoded bytes, or a struct of `bytes` and
    `path`.

    Only the named columns are read. A row is a dict of them, with `image` as the encoded image's
    bytes: images stay in one Arrow buffer, shared by worker processes, until a row is accessed.
    Raises ValueError for a file that is missing or not Parquet, for missing columns, and for rows
    without an image.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; check the folder.")
        with parquet_error(path):
            file = open_parquet(path)
            missing = sorted({"image", *columns} - set(file.schema_arrow.names))
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; is it the right file?"
                )
            bytes_of(file.schema_arrow, path)
            table = file.read(columns=["image", *columns])
            images = table["image"]
            self._images = (
                pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
            )
        if self._images.null_count:
            raise ValueError(
                f"{path}: {self._images.null_count} of {len(table)} rows hold no image bytes; "
                "store the images in the file, not only their paths."
            )
        self.columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in columns}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        row = {name: values[index] for name, values in self.columns.items()}
        return {"image": self._images[index].as_py(), **row}
