"""Parquet files with an image column, as Hugging Face data sets store them, at random access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


class ImageTable(Sequence[dict[str, Any]]):
    """Rows of a Parquet file with an `image` column (a struct of the encoded `bytes` and a `path`).

    Only the named columns are read. A row is a dict of them, with `image` as the encoded image's bytes:
    images stay in one Arrow buffer, which worker processes share, until a row is asked for.
    Raises ValueError for a file that is missing, no Parquet file, without one of the columns, or with rows
    that hold no image.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        wanted = ["image", *columns]
        if not path.is_file():
            raise ValueError(f"{path} does not exist; check the folder.")
        try:
            missing = sorted(set(wanted) - set(pq.read_schema(path).names))
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}; is it the right file?")
            table = pq.read_table(path, columns=wanted)
            self._images = pc.struct_field(table["image"], "bytes")
        except pa.ArrowException as error:
            raise ValueError(f"{path} cannot be read as a Parquet file: {error}; fetch it again.") from error
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
