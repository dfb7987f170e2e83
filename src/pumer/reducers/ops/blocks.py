"""Split products that are too large for memory into blocks of rows."""

from __future__ import annotations

BLOCK = 2**20
"""Elements that a block may always have: 4 MiB in float32, which fit into a cache."""


def row_blocks(rows: int, columns: int, width: int) -> list[slice]:
    """Slices of the rows of a product over `width` channels with `columns` columns.

    A block has at most `BLOCK` elements, or as many as the factor of `width` x `columns` elements,
    so memory is linear in both. The slices depend on shapes alone; short prompts have one.
    """
    step = max(1, width, BLOCK // max(1, columns))
    if rows <= step:
        return [slice(0, rows)]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
