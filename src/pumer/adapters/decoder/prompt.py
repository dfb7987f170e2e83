"""Where text and images lie on the token layout of a language model, and what a call hands on.

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer, P crops, I image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumer.reducers import Plan
from pumer.reducers.tokens import Encoder, Grid


@dataclass(frozen=True)
class ImageSpan:
    """One image as the language model gets it: all its crops, in the order in which the model puts
    them together.

    Args:
        length: placeholders that it takes in the prompt.
        structure: bool on the host, true for placeholders that are no patches but rows' ends and
            the like; None if all are patches.
        grid: rows and columns, where the patches are all those of one grid in raster order.
        encoder: what the vision tower knows of the patches, every tensor [1,I,...].
        merged: the plan by which patches were merged in the vision tower or before the projector,
            of one row; None if they were not.
        crop_I: of several crops that of every patch, int64 on the host; None if there is one.
        crop_grids: of several crops rows and columns of each, None for one whose patches in raster
            order are no grid.
    """

    length: int
    structure: Tensor | None = None
    grid: Grid | None = None
    encoder: Encoder | None = None
    merged: Plan | None = None
    crop_I: Tensor | None = None
    crop_grids: tuple[Grid | None, ...] = ()

    @property
    def num_patches(self) -> int:
        """How many of the placeholders are patches."""
        return self.length if self.structure is None else self.length - int(self.structure.sum())


@dataclass(frozen=True)
class CropGroups:
    """Crops that are images of their own to the vision tower, and parts of one image to the
    prompt.

    Args:
        joined_P: bool, whether each crop belongs to the image of the one before it.
        between_BS: bool, tokens between crops of one image.
    """

    joined_P: Tensor
    between_BS: Tensor

    @classmethod
    def of(
        cls,
        image_BS: Tensor,
        crop_length: int,
        num_features: int,
        ids_BS: Tensor | None = None,
        gap: int = 0,
        from_first: bool = False,
    ) -> CropGroups:
        """Crops of `crop_length` placeholders each.

        Crops that follow one another with at most `gap` tokens in between are of one image. Where
        `ids_BS` is given, every image ends with a crop that has the same token before it: that
        which the last crop of the sample has. With `from_first`, it begins with one that has the
        token that the first crop of the sample has.
        """
        length = image_BS.shape[1]
        flat = (~image_BS).flatten().to(torch.uint8).argsort(stable=True)[:num_features]
        first_P, last_P = flat[::crop_length], flat[crop_length - 1 :: crop_length]
        row_P = first_P // length
        same_P = row_P[1:] == row_P[:-1]
        if ids_BS is None:
            same_P = same_P & (first_P[1:] <= last_P[:-1] + 1 + gap)
        else:
            label_P = ids_BS.flatten()[(first_P - 1).clamp_min(0)]
            if from_first:
                same_P = same_P & (label_P != label_P[torch.searchsorted(row_P, row_P)])[1:]
            else:
                final_P = torch.searchsorted(row_P, row_P, right=True) - 1
                same_P = same_P & (label_P != label_P[final_P])[:-1]
        steps = torch.zeros(image_BS.numel() + 1, dtype=torch.int64, device=image_BS.device)
        steps = steps.scatter_add(0, last_P[:-1] + 1, same_P.long()).scatter_add(
            0, first_P[1:], -same_P.long()
        )
        between = steps[:-1].cumsum(0).bool().view_as(image_BS)
        return cls(nn.functional.pad(same_P, (1, 0)), between)


def inside_images(image_BS: Tensor, lengths: Sequence[int], num_features: int) -> Tensor:
    """Tokens between placeholders of one image, such as the ends of rows, bool [B,S].

    Args:
        image_BS: bool, the placeholders.
        lengths: how many of them every image has, in order.
        num_features: image features in the prompts: a multiple where samples are repeated.
    """
    copies = max(1, num_features // max(1, sum(lengths)))
    if num_features != copies * sum(lengths) or len(image_BS) % copies:
        return torch.zeros_like(image_BS)  # they do not match: an error will say so
    before_BS = image_BS.long().cumsum(1)
    count_B = before_BS[::copies, -1]
    first_B = (count_B.cumsum(0) - count_B).repeat_interleave(copies)
    # Of every token the next placeholder among those of all images, and the image that it is of.
    next_BS = before_BS + first_B[:, None]
    ends = to_device(torch.tensor(lengths, dtype=torch.int64).cumsum(0), image_BS.device)
    image_of = partial(torch.bucketize, boundaries=ends, right=True)
    one_image_BS = image_of(next_BS) == image_of(next_BS - 1)
    within_BS = (before_BS > 0) & (before_BS < before_BS[:, -1:])
    return ~image_BS & within_BS & one_image_BS


def shift(x_BS: Tensor, step: int) -> Tensor:
    """The mask moved `step` positions to the right, or to the left where it is negative."""
    if step == 0:
        return x_BS
    return (
        nn.functional.pad(x_BS[:, :-step], (step, 0))
        if step > 0
        else nn.functional.pad(x_BS[:, -step:], (0, -step))
    )


def join_encoders(
    encoders: Sequence[Encoder | None], join: Callable[[list[Tensor]], Tensor]
) -> Encoder | None:
    """One encoder's facts out of several, field by field; None if one of them is missing."""
    present = [encoder for encoder in encoders if encoder is not None]
    if len(present) != len(encoders):
        return None
    return Encoder(
        **{
            field.name: join([getattr(encoder, field.name) for encoder in present])
            for field in fields(Encoder)
            if getattr(present[0], field.name) is not None
        }
    )


def join_spans(parts: Sequence[ImageSpan]) -> ImageSpan:
    """The image that these crops are of, in order."""
    if len(parts) == 1:
        return parts[0]
    structures = [
        torch.zeros(part.length, dtype=torch.bool) if part.structure is None else part.structure
        for part in parts
    ]
    structure = torch.cat(structures)
    merged = [part.merged for part in parts if part.merged is not None]
    num_patches = torch.tensor([part.num_patches for part in parts])
    return ImageSpan(
        len(structure),
        structure if structure.any() else None,
        encoder=join_encoders([part.encoder for part in parts], partial(torch.cat, dim=1)),
        merged=Plan.side_by_side(merged) if merged else None,
        crop_I=torch.arange(len(parts)).repeat_interleave(num_patches),
        crop_grids=tuple(part.grid for part in parts),
    )


@dataclass(frozen=True)
class TokenLayout:
    """The tokens between two layers, and where in the prompt they come from; never changed in
    place.

    Args:
        index_BK: position of every token in the prompt; a merged one is where its first member was.
        filled_BK: bool, false for empty slots, which lie at the left; None where all are filled.
        text_BK, image_BK: bool, the words that a reducer sees, and the patches; both false for
            padding, structure tokens and answers.
        question_BK: bool, the words that are the question.
        hidden_BK: bool, real tokens that are neither text nor image, whose keys the text attends
            to.
        sizes_BK: how many tokens of the prompt each token stands for.
        carried_BK: what the reducer wants to see again of every token; None without such.
        counts: (text, image) tokens of every sample, on the host.
        unreduced: whether these are still all tokens of the prompt.
    """

    index_BK: Tensor
    filled_BK: Tensor | None
    text_BK: Tensor
    image_BK: Tensor
    question_BK: Tensor
    hidden_BK: Tensor
    sizes_BK: Tensor
    counts: tuple[tuple[int, int], ...]
    carried_BK: Tensor | None = None
    unreduced: bool = True

    @property
    def lengths(self) -> tuple[int, int]:
        """(text, image) tokens, the most that any sample has."""
        return max(text for text, _ in self.counts), max(image for _, image in self.counts)

    def to(self, device: torch.device) -> TokenLayout:
        """The same where a model's layers are spread over devices."""
        if self.index_BK.device == device:
            return self
        return replace(
            self,
            index_BK=self.index_BK.to(device),
            filled_BK=None if self.filled_BK is None else self.filled_BK.to(device),
            text_BK=self.text_BK.to(device),
            image_BK=self.image_BK.to(device),
            question_BK=self.question_BK.to(device),
            hidden_BK=self.hidden_BK.to(device),
            sizes_BK=self.sizes_BK.to(device),
            carried_BK=None if self.carried_BK is None else self.carried_BK.to(device),
        )

    def text_then_image(self) -> tuple[Tensor, Tensor]:
        """Index in this layout of the tokens that a reducer sees, text first, and which are
        real: int64 and bool [B,N]."""
        text, image = self.lengths
        parts = [Plan.keep(self.text_BK, text), Plan.keep(self.image_BK, image)]
        indices = [part.index_BK for part in parts if part.index_BK is not None]
        return torch.cat(indices, 1), torch.cat([part.mask_BK for part in parts], 1)

    def after(self, plan: Plan, counts: tuple[tuple[int, int], ...], gaps: bool) -> TokenLayout:
        """The layout after a plan for it; `gaps` says whether that leaves empty slots."""
        index_BK, filled_BK = plan.index_BK, plan.mask_BK
        assert index_BK is not None
        return replace(
            self,
            index_BK=self.index_BK.gather(1, index_BK),
            filled_BK=filled_BK if gaps else None,
            text_BK=self.text_BK.gather(1, index_BK) & filled_BK,
            image_BK=self.image_BK.gather(1, index_BK) & filled_BK,
            question_BK=self.question_BK.gather(1, index_BK) & filled_BK,
            hidden_BK=self.hidden_BK.gather(1, index_BK) & filled_BK,
            sizes_BK=plan.total(self.sizes_BK),
            carried_BK=None if self.carried_BK is None else plan.total(self.carried_BK),
            counts=counts,
            unreduced=False,
        )

    def index_of_survivor(self, length: int) -> Tensor:
        """For every token of a prompt of that length the one here that stands for it, int64 [B,S].

        A dropped token is represented by the last kept one before it, so that the label after it
        is predicted from what precedes it in the shorter prompt.
        """
        batch, tokens = self.index_BK.shape
        filled = torch.ones_like(self.index_BK) if self.filled_BK is None else self.filled_BK.long()
        marks = torch.zeros(batch, length, dtype=torch.int64, device=filled.device).scatter_add(
            1, self.index_BK, filled
        )
        first = tokens - filled.sum(1, keepdim=True)
        return torch.maximum(marks.cumsum(1) - 1, torch.zeros_like(marks)) + first


@dataclass(frozen=True)
class PromptStep:
    """A decoder's prompt after one reduction: for looking at, never needed for computing.

    Args:
        slot_BS: slot of every token of the prompt, -1 for those that are gone.
        image_BS: bool, which tokens are patches; None but for the first reduction of a call.
        images: (sample, patches, grid) of every image of the call, in order; the grid is None where
            patches are not those of one grid, as with crops.
    """

    slot_BS: Tensor
    image_BS: Tensor | None
    images: tuple[tuple[int, int, Grid | None], ...]


@dataclass(eq=False)
class ForwardState:
    """What one call of a reduced model hands from hook to hook; it ends with the call.

    Args:
        hooks: those that the call runs through.
        call_kwargs: arguments of the whole model.
        inputs: arguments of the model without its head.
        tower_images: images of the call, in order, as the vision tower gave them.
        length: tokens of the prompts, S.
        past: tokens in the cache before them, as the model counts them.
        cache: the key-value cache; None if the call has none.
        mask_BL: attention mask of cache and prompts, 1 at real tokens; None where all are real.
        images: of the prompts, in order.
        sample_index: sample of every image.
        num_untouched: tokens of every sample that no reducer gets: padding and structure tokens.
        num_hidden: the real ones among them, whose keys the text attends to.
        layout: tokens of the layer that runs; None where the call brings no images.
        plan: from the prompt to that layout; None while nothing was reduced.
        layouts: those of every layer that has run.
        plans: from the layout before to that of every layer; None where nothing was reduced there.
        widths: tokens that the states of these layers really have.
        embeddings_BSD: states before layer 0, where the reducer reads them.
        layer_input_BKD: what the layer was given after which the reducer acts next, where it reads
            that.
        planes: placeholders [B,S,1], and features that are added to them before layers.
        attention: of the layers after which the reducer acts, until it has acted.
        memo: what `memoize` has computed, with what it was computed from.
        entry: (text, image, grid) before anything was reduced.
        trunk_entered: whether the model without its head has begun.
        language_entered: whether the language model has.
        in_language: whether it runs now, on a prompt that may have been made shorter before it.
        shortened: whether that prompt, or one in the cache, was.
        counted_BK: positions of its tokens, counted anew, where layers cannot be told others.
    """

    hooks: Any
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    tower_images: list[ImageSpan] = field(default_factory=list)
    length: int = 0
    past: int = 0
    cache: Any = None
    mask_BL: Tensor | None = None
    images: list[ImageSpan] = field(default_factory=list)
    sample_index: list[int] = field(default_factory=list)
    num_untouched: list[int] = field(default_factory=list)
    num_hidden: list[int] = field(default_factory=list)
    layout: TokenLayout | None = None
    plan: Plan | None = None
    layouts: list[TokenLayout] = field(default_factory=list)
    plans: list[Plan | None] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    embeddings_BSD: Tensor | None = None
    layer_input_BKD: Tensor | None = None
    planes: tuple[Tensor, dict[int, Tensor]] | None = None
    attention: dict[int, Any] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    entry: tuple[int, int, Grid | None] | None = None
    trunk_entered: bool = False
    language_entered: bool = False
    in_language: bool = False
    shortened: bool = False
    counted_BK: Tensor | None = None

    def positions_of(
        self, layout: TokenLayout | None, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Positions of a layer's tokens as the model counts them [B,K], and which slots are filled;
        None for all."""
        if layout is None:
            positions = torch.arange(self.past, self.past + self.length, device=device)
            return positions.expand(batch, -1), None
        return layout.index_BK + self.past, layout.filled_BK

    def memoize(self, sources: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """`compute()`, once for these objects: the layers after the first one share the result."""
        key = tuple(map(id, sources))
        if key not in self.memo:
            self.memo[key] = sources, compute()  # kept, so that no other object gets their id
        return self.memo[key][1]


_current: ContextVar[ForwardState | None] = ContextVar("pumer_forward_state", default=None)


def current_state(hooks: Any = None) -> ForwardState | None:
    """The state of the call that runs in this thread; None outside of one, or in one of other
    hooks."""
    state = _current.get()
    return state if state is None or hooks is None or state.hooks is hooks else None


@contextmanager
def enter_state(state: ForwardState) -> Iterator[ForwardState]:
    """Make this the state of the call inside the with block, and restore the one before."""
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


def to_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """A small tensor made on the host, on the device without the host's waiting for it."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
