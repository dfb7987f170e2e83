"""Images with captions from a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pumer.lab.data.parquet import ImageTable


@dataclass(frozen=True)
class Caption:
    """An image and its caption.

    `image` is the encoded image's bytes. Equivalent captions share a `caption_group`: a retrieved
    caption is right if its group is the image's. `rights` is the image's license.
    """

    id: str
    image: bytes
    caption: str
    caption_group: str
    rights: str


class Captions(Sequence[Caption]):
    """The rows of an image-caption Parquet file.

    Columns read: `image` (a struct of `bytes` and `path`), `id`, `caption`, `caption_group`,
    `rights`. Raises ValueError for a missing or broken file, a missing column, repeated ids and
    empty captions.
    """

    def __init__(self, path: str | Path):
        columns = [field.name for field in fields(Caption) if field.name != "image"]
        self._table = ImageTable(Path(path), columns)
        ids, captions = self._table.columns["id"], self._table.columns["caption"]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"{path}: {len(ids) - len(set(ids))} of {len(ids)} rows repeat an id; remove them."
            )
        empty = [
            name for name, caption in zip(ids, captions, strict=True) if not (caption or "").strip()
        ]
        if empty:
            raise ValueError(
                f"{path}: {len(empty)} rows have no caption, for example {empty[0]}; remove them."
            )

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Caption:  # type: ignore[override]  # no slices
        return Caption(**self._table[index])
