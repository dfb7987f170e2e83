"""Products too large to be there at one time, a block of rows after the other."""

from __future__ import annotations

BLOCK = 2**20
"""Elements that a block of rows may have at any rate: 4 MiB in float32, which stay in a cache."""


def row_blocks(rows: int, columns: int, width: int) -> list[slice]:
    """Slices of the rows of a product of `width` channels, whose rows have `columns` elements.

    A block is no larger than `BLOCK`, or than the factor that has `width` x `columns` elements: so
    memory is linear in both. The slices follow from shapes alone; short prompts have one.
    """
    step = max(1, width, BLOCK // max(1, columns))
    if rows <= step:
        return [slice(0, rows)]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
