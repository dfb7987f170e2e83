"""A memory: the tokens of an encoder that others read by cross-attention, and their reduction.

Shape suffixes: B rows of the memory, L its tokens, K those that are left, Q queries of a reader, D
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pumer.adapters.base import Patch
from pumer.adapters.decoder import reduce as decoder_reduce
from pumer.adapters.decoder.attention import slice_attention_mask
from pumer.adapters.decoder.prompt import ForwardState, ImageSpan, TokenLayout
from pumer.adapters.decoder.view import image_rows
from pumer.adapters.forward import timed
from pumer.reducers import EMBEDDINGS, TokenShape


@dataclass(frozen=True)
class MemoryImages:
    """The images in a memory.

    Args:
        spans: one for each image, in order.
        sample_index: the row of each.
        patch_BL: bool, the tokens that a reducer chooses from.
        num_structure: real tokens of every row that are no patches, such as [CLS].
        real_BL: bool, false for padding, which leaves with the first token that does; None where
            all are real.
    """

    spans: list[ImageSpan]
    sample_index: list[int]
    patch_BL: Tensor
    num_structure: list[int]
    real_BL: Tensor | None = None


@dataclass(frozen=True)
class Remaining:
    """What is left of a memory.

    Args:
        states_BKD: None where the memory stays as it is, which it must not keep alive.
        index_BK: positions in the memory; None where it stays as it is.
        filled_BK: bool, false for empty slots; None where there are none.
        counts: image tokens of the fullest row: before, as planned, and as they are.
    """

    states_BKD: Tensor | None = None
    index_BK: Tensor | None = None
    filled_BK: Tensor | None = None
    counts: tuple[int, int, int] = (0, 0, 0)

    def cut_mask(self, mask: Any, wide: bool, backend: str, dtype: torch.dtype) -> Any:
        """A reader's mask, cut to the tokens left.

        Args:
            mask: [B,L], 1 for tokens that are read, or `wide`: [B,1,Q,L], bool or added to the
                logits; None where all are read.
            wide: which of the two the reader takes.
            backend: the reader's attention.
            dtype: of its states.
        """
        if self.index_BK is None:
            return mask
        if mask is None and not wide:
            return self.filled_BK
        return slice_attention_mask(
            mask, None, self.index_BK, self.filled_BK, 0, 0, 0, backend, dtype, causal=False
        )


@timed("decoder")
def reduce(patch: Patch, memory_BLD: Tensor, images: MemoryImages) -> Remaining:
    """Let the reducer act on a memory. Rows of which it keeps every token keep their padding, too:
    nothing changes there."""
    reducer, (batch, length) = patch.reducer, memory_BLD.shape[:2]
    per_row = [0] * batch
    for span, row in zip(images.spans, images.sample_index, strict=True):
        per_row[row] += span.num_patches
    most = max(per_row, default=0)
    if not most or not reducer.reduces_at(EMBEDDINGS):
        return Remaining(counts=(most, most, most))
    changes = _changing_rows(patch, images, batch)
    if not any(changes):
        return Remaining(counts=(most, most, most))

    # A prompt without words, in which all that is no patch stays.
    device = memory_BLD.device
    filled_BL = None
    if images.real_BL is not None:
        changes_B1 = torch.tensor(changes, device=device)[:, None]
        filled_BL = images.real_BL | ~changes_B1
    no_text_BL = torch.zeros(batch, length, dtype=torch.bool, device=device)
    padded = images.real_BL is not None
    state = ForwardState(
        None,
        images=images.spans,
        sample_index=images.sample_index,
        length=length,
        num_untouched=[
            structure if change or not padded else length - patches
            for structure, change, patches in zip(
                images.num_structure, changes, per_row, strict=True
            )
        ],
    )
    state.layout = TokenLayout(
        index_BK=torch.arange(length, device=device).expand(batch, length),
        filled_BK=filled_BL,
        text_BK=no_text_BL,
        image_BK=images.patch_BL,
        question_BK=no_text_BL,
        hidden_BK=no_text_BL,
        sizes_BK=torch.ones(batch, length, device=device),
        counts=tuple((0, patches) for patches in per_row),
    )
    states_BKD, _ = decoder_reduce.reduce(patch, state, EMBEDDINGS, memory_BLD, causal=False)
    layout = state.layout
    num_left = [
        untouched + image
        for untouched, (_, image) in zip(state.num_untouched, layout.counts, strict=True)
    ]
    planned = max(image for _, image in layout.counts)
    ran = planned + states_BKD.shape[1] - max(num_left)
    return Remaining(states_BKD, layout.index_BK, layout.filled_BK, (most, planned, ran))


def _changing_rows(patch: Patch, images: MemoryImages, batch: int) -> list[bool]:
    """Which rows lose tokens, as far as the counts say."""
    reducer = patch.reducer
    changes = [False] * batch
    for row in image_rows(images.spans, images.sample_index, reducer.traits.per_crop):
        count = len(row.patch_I)
        _, num_left = reducer.lengths(TokenShape(0, count, EMBEDDINGS, 0, row.grid))
        changes[row.sample] |= num_left < count or reducer.traits.dynamic_length
    return changes


def positions(remaining: Remaining, memory_BLD: Tensor) -> Tensor:
    """Positions in the memory of the tokens left, in order, -1 behind them [B,K]."""
    if remaining.index_BK is None:
        rows, length = memory_BLD.shape[:2]
        return torch.arange(length, device=memory_BLD.device).expand(rows, length)
    if remaining.filled_BK is None:
        return remaining.index_BK
    order_BK = (~remaining.filled_BK).to(torch.uint8).argsort(dim=1, stable=True)
    return remaining.index_BK.masked_fill(~remaining.filled_BK, -1).gather(1, order_BK)


class Memories:
    """What is left of memories that are read more than once, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._remaining: Any = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which hold no memories."""
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]

    def get(self, memory: Tensor) -> Remaining | None:
        """What is left of it; None for one that was not read yet."""
        remaining: Remaining | None = self._remaining.get(memory)
        return remaining

    def put(self, memory: Tensor, remaining: Remaining) -> None:
        """Note what is left of it."""
        self._remaining[memory] = remaining
