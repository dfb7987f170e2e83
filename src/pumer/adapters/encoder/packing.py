"""The rows of a batch end to end, without the padding between them: `pumer.apply(..., pack=True)`.

Only what has channels is packed: states, queries, keys, values. Masks, sizes and plans stay padded,
so that a reducer sees the same tokens either way. A shape depends on the lengths of the rows, so
the host has to read them: once at the entry, and once wherever tokens leave.

Shape suffixes: B batch, N tokens of the padded axis, P tokens of all rows end to end, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pumer.adapters.forward import max_length


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a padded axis are when its rows lie end to end.

    Args:
        index_P: int64, the position of every packed token in the flattened padded axis [B*N].
        padding_R: int64, the positions of the rest.
        batch: number of rows.
        width: tokens N of the padded axis.
        lengths: tokens of every row; empty where rows do not lie together.
    """

    index_P: Tensor
    padding_R: Tensor
    batch: int
    width: int
    lengths: tuple[int, ...]

    @property
    def row_P(self) -> Tensor:
        """The row of every packed token."""
        return self.index_P // max(self.width, 1)

    def within(self, index: Tensor, width: int, first: int) -> Tensor:
        """Positions on this axis as those on a longer one, where it starts at column `first`."""
        columns = max(self.width, 1)
        return index // columns * width + index % columns + first

    def pack(self, x_BND: Tensor) -> Tensor:
        """A padded tensor [B,N] or [B,N,...] without its padding, [1,P] or [1,P,...]."""
        return x_BND.flatten(0, 1).index_select(0, self.index_P)[None]

    def pad(self, x_1PD: Tensor) -> Tensor:
        """A packed tensor with its padding, which is zero."""
        padded = x_1PD.new_empty(self.batch * self.width, *x_1PD.shape[2:])
        padded = padded.index_copy_(0, self.index_P, x_1PD[0]).index_fill_(0, self.padding_R, 0)
        return padded.unflatten(0, (self.batch, self.width))

    def pad_heads(self, x_1HPC: Tensor) -> Tensor:
        """Packed queries, keys or values [1,H,P,C] with their padding, [B,H,N,C]."""
        return self.pad(x_1HPC.transpose(1, 2)).transpose(1, 2)

    def sums(self, x_1PD: Tensor) -> Tensor:
        """The sum of every row, [B,D]."""
        total = x_1PD.new_zeros(self.batch, *x_1PD.shape[2:])
        return total.index_add(0, self.row_P, x_1PD[0])


@dataclass(frozen=True)
class Counts:
    """What the host has to know of a mask to pack what it masks.

    Args:
        lengths: (text, image) tokens of every row.
        used: (text, image) slots up to the last one in use in any row.
        hidden: whether a row starts with a masked token. It stays, because models pool it, but
            nothing attends to it: a text without any word.
    """

    lengths: tuple[tuple[int, int], ...]
    used: tuple[int, int]
    hidden: bool


def count(mask_BN: Tensor, text: int) -> Counts:
    """Counts of an axis of `text` text tokens and image tokens; one host-device sync."""
    real_BN, parts = _real(mask_BN), (slice(0, text), slice(text, None))
    numbers = torch.cat(
        [
            *(real_BN[:, part].sum(1) for part in parts),
            *(_used(real_BN[:, part])[None] for part in parts),
            (real_BN != mask_BN).any()[None],
        ]
    ).tolist()
    batch = len(mask_BN)
    texts, images = numbers[:batch], numbers[batch : 2 * batch]
    last_text, last_image, hidden = numbers[2 * batch :]
    lengths = tuple(zip(texts, images, strict=True))
    return Counts(lengths, (last_text, last_image), bool(hidden))


def _used(mask_BN: Tensor) -> Tensor:
    return max_length(mask_BN) if mask_BN.shape[1] else mask_BN.new_zeros((), dtype=torch.int64)


def _real(mask_BN: Tensor) -> Tensor:
    """The tokens that are packed: the real ones, and the first of every row."""
    first_N = torch.arange(mask_BN.shape[1], device=mask_BN.device) == 0
    return mask_BN | first_N


@dataclass(frozen=True)
class Packing:
    """How the joint token axis of text and image is packed.

    Args:
        real_BN: bool, the tokens that are packed.
        text: text tokens of the padded axis.
        counts: of every row.
        two_streams: whether text and image have states of their own. The texts of all rows then
            come before all images; else a row's image follows its text.
    """

    real_BN: Tensor
    text: int
    counts: Counts
    two_streams: bool

    @staticmethod
    def of(mask_BN: Tensor, text: int, counts: Counts, two_streams: bool) -> Packing | None:
        """The packing of an axis with this mask; None where no row has padding."""
        tokens = sum(map(sum, counts.lengths))
        if tokens == mask_BN.numel() and not counts.hidden:
            return None
        return Packing(_real(mask_BN), text, counts, two_streams)

    def to(self, device: torch.device, non_blocking: bool = False) -> Packing:
        """The packing on another device."""
        return replace(self, real_BN=self.real_BN.to(device))

    @property
    def border(self) -> int:
        """Packed text tokens: where the images start, in two streams."""
        return sum(text for text, _ in self.counts.lengths)

    @cached_property
    def texts(self) -> Rows:
        """Of the text alone."""
        return _rows(self.real_BN[:, : self.text], [text for text, _ in self.counts.lengths])

    @cached_property
    def images(self) -> Rows:
        """Of the image alone."""
        return _rows(self.real_BN[:, self.text :], [image for _, image in self.counts.lengths])

    @cached_property
    def joint(self) -> Rows:
        """Of both."""
        if not self.two_streams:
            return _rows(self.real_BN, [sum(lengths) for lengths in self.counts.lengths])
        width, parts = self.real_BN.shape[1], ((self.texts, 0), (self.images, self.text))
        index_P = torch.cat([rows.within(rows.index_P, width, at) for rows, at in parts])
        padding_R = torch.cat([rows.within(rows.padding_R, width, at) for rows, at in parts])
        return Rows(index_P, padding_R, len(self.real_BN), width, ())

    def at(self, columns: slice) -> Rows:
        """Of these columns of the padded axis: all, the text, or the image."""
        if columns.start:
            return self.images
        return self.joint if columns.stop is None else self.texts

    def stream(self, states_1PD: Tensor, columns: slice) -> Tensor:
        """The packed text or image, out of rows of both."""
        lengths = [length for row in self.counts.lengths for length in row]
        return torch.cat(states_1PD.split(lengths, 1)[1 if columns.start else 0 :: 2], 1)


def _rows(real_BN: Tensor, lengths: list[int]) -> Rows:
    # A stable sort, as `nonzero` would make the host wait.
    order = (~real_BN).flatten().to(torch.uint8).argsort(stable=True)
    batch, width = real_BN.shape
    tokens = sum(lengths)
    return Rows(order[:tokens], order[tokens:], batch, width, tuple(lengths))
