"""Where text and images lie on the token axis of a language model, and how a plan for them changes
that axis.

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer, R rows of a view, N tokens
of a view, T text tokens, I image tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pumer.reducers import Plan, Tokens
from pumer.reducers.tokens import Encoder, Grid


@dataclass(frozen=True)
class Picture:
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
    """

    length: int
    structure: Tensor | None = None
    grid: Grid | None = None
    encoder: Encoder | None = None
    merged: Plan | None = None
    crop_I: Tensor | None = None

    @property
    def patches(self) -> int:
        """How many of the placeholders are patches."""
        return self.length if self.structure is None else self.length - int(self.structure.sum())


@dataclass(frozen=True)
class Axis:
    """The token axis between two layers; handed from layer to layer, never changed in place.

    Args:
        index_BK: place of every token in the prompt; a merged one is where its first member was.
        filled_BK: bool, false for empty slots, which lie at the left; None where all are filled.
        text_BK, image_BK: bool, words that a reducer is shown and patches; both false for padding,
            structure tokens and answers.
        question_BK: bool, those of the words that are the question.
        hidden_BK: bool, real tokens that are neither, whose keys the text attends to.
        sizes_BK: tokens of the prompt that each token stands for.
        counts: (text, image) tokens of every sample, on the host.
        whole: whether nothing was reduced yet.
    """

    index_BK: Tensor
    filled_BK: Tensor | None
    text_BK: Tensor
    image_BK: Tensor
    question_BK: Tensor
    hidden_BK: Tensor
    sizes_BK: Tensor
    counts: tuple[tuple[int, int], ...]
    whole: bool = True

    @property
    def lengths(self) -> tuple[int, int]:
        """(text, image) tokens, the most that any sample has."""
        return max(text for text, _ in self.counts), max(image for _, image in self.counts)

    def to(self, device: torch.device) -> Axis:
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
        )

    def view(self) -> tuple[Tensor, Tensor]:
        """Places on this axis of a reducer's tokens, text first, then the image: int64 and bool
        [B,N]."""
        text, image = self.lengths
        parts = [Plan.keep(self.text_BK, text), Plan.keep(self.image_BK, image)]
        places = [part.index_BK for part in parts if part.index_BK is not None]
        return torch.cat(places, 1), torch.cat([part.mask_BK for part in parts], 1)

    def then(self, placed: Plan, counts: tuple[tuple[int, int], ...], gaps: bool) -> Axis:
        """The axis after a plan for it; `gaps` says whether that leaves empty slots."""
        index_BK, filled_BK = placed.index_BK, placed.mask_BK
        assert index_BK is not None
        return replace(
            self,
            index_BK=self.index_BK.gather(1, index_BK),
            filled_BK=filled_BK if gaps else None,
            text_BK=self.text_BK.gather(1, index_BK) & filled_BK,
            image_BK=self.image_BK.gather(1, index_BK) & filled_BK,
            question_BK=self.question_BK.gather(1, index_BK) & filled_BK,
            hidden_BK=self.hidden_BK.gather(1, index_BK) & filled_BK,
            sizes_BK=placed.total(self.sizes_BK),
            counts=counts,
            whole=False,
        )

    def spread(self, length: int) -> Tensor:
        """For every place of a prompt of that length the token here that stands for it, int64
        [B,S].

        A token that is gone is stood for by the last one before it that is left, so that the label
        after it is asked of what comes before it in the shorter prompt.
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


@dataclass(frozen=True)
class View:
    """What a reducer sees of an axis: every sample in a row of its own, or every image with its
    sample's text.

    Args:
        tokens: text first, then the image.
        at_RN: their places on the axis.
        own_RN: bool, those that a plan for the view may touch.
        owner: sample of every row.
    """

    tokens: Tokens
    at_RN: Tensor
    own_RN: Tensor
    owner: Sequence[int]


@dataclass(eq=False)
class ForwardState:
    """What one call of a reduced model hands from hook to hook; it ends with the call.

    Args:
        owner: whose hooks these are.
        call_kwargs: what the whole model was called with.
        inputs: what the model without its head was called with.
        images: of the call, in order, as the vision tower gave them.
        length: tokens of the prompts, S.
        past: tokens in the cache before them, as the model counts them.
        mask_BL: attention mask of cache and prompts, 1 at real tokens; None where all are real.
        pictures: images of the prompts, in order.
        owners: sample of every image.
        rest: tokens of every sample that no reducer sees: padding and structure tokens.
        hidden: of these the real ones, whose keys the text attends to.
        axis: tokens of the layer that runs; None where the call brings no images.
        plan: from the prompt to that axis; None while nothing was reduced.
        axes: those of every layer that has run.
        plans: from the axis before to that of every layer; None where nothing was reduced there.
        widths: tokens that the states of these layers really have.
        embeddings_BSD: states before layer 0, where the reducer reads them.
        seen: what was seen of the attention of a layer that reduces.
        cut: masks and positions that were cut already, with what they were cut from.
        entry: (text, image, grid) before anything was reduced.
        entered: whether the model without its head has begun.
        left: whether the language model has.
    """

    owner: Any
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    images: list[Picture] = field(default_factory=list)
    length: int = 0
    past: int = 0
    mask_BL: Tensor | None = None
    pictures: list[Picture] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    axis: Axis | None = None
    plan: Plan | None = None
    axes: list[Axis] = field(default_factory=list)
    plans: list[Plan | None] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    embeddings_BSD: Tensor | None = None
    seen: dict[int, Attended] = field(default_factory=dict)
    cut: dict[Any, Any] = field(default_factory=dict)
    entry: tuple[int, int, Grid | None] | None = None
    entered: bool = False
    left: bool = False

    def places_of(
        self, axis: Axis | None, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Places of a layer's tokens as the model counts them [B,K], and which are filled; None for
        all."""
        if axis is None:
            places = torch.arange(self.past, self.past + self.length, device=device)
            return places.expand(batch, -1), None
        return axis.index_BK + self.past, axis.filled_BK

    def once(self, sources: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What is made of these objects: made for the first layer that asks, the same for all
        others."""
        key = tuple(map(id, sources))
        if key not in self.cut:
            self.cut[key] = sources, make()  # kept, so that no other object gets their id
        return self.cut[key][1]


_current: ContextVar[ForwardState | None] = ContextVar("pumer_forward_state", default=None)


def current_state(owner: Any = None) -> ForwardState | None:
    """The state of the call that runs in this thread; None outside of one, or where it is not
    `owner`'s."""
    state = _current.get()
    return state if state is None or owner is None or state.owner is owner else None


@contextmanager
def enter_state(state: ForwardState) -> Iterator[ForwardState]:
    """Let this be the state of the call inside the with block; the one before is back afterwards,
    come what may."""
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Attended:
    """What the attention of a layer was asked: all its queries, all its keys, and by what rule.

    Args:
        queries_BHKC: of the layer's tokens; products with keys over sqrt(C) are the logits.
        keys_BhLC: of the tokens that its cache holds, and behind them of its own.
        window: a token sees only places later than its own less this number; None for all.
        softcap: bound of the logits; None for none.
        held: what the cache held before this call; None if every token.
        normalizer_BHK: log-sum-exp of the logits of every query; None where the kernel does not
            say.
    """

    queries_BHKC: Tensor
    keys_BhLC: Tensor
    window: int | None = None
    softcap: float | None = None
    held: Any = None
    normalizer_BHK: Tensor | None = None


def place(
    plan: Plan, axis: Axis, row_R: Tensor | None, at_RN: Tensor, valid_RN: Tensor, slots: int
) -> Plan:
    """A plan for a view, as a plan for the axis the view is of.

    Tokens outside the view stay, those left keep their order, a merged one stands where its first
    member stood, and empty slots come first, so that the last token is the last one again.

    Args:
        plan: of the view.
        axis: the axis.
        row_R: sample of every row of the view; None where they are the same.
        at_RN: places of the view's tokens on the axis.
        valid_RN: bool, false for padding of the view, and for tokens that the plan is not to touch.
        slots: number of slots, at least the tokens left in any sample.
    """
    batch, count = axis.index_BK.shape
    device = at_RN.device
    row_R1 = torch.arange(batch, device=device)[:, None] if row_R is None else row_R[:, None]

    # Of every slot the first place that goes into it, and of every token of the view that place.
    slot_RN = torch.where((plan.slot_BN < 0) | ~valid_RN, plan.slots, plan.slot_BN)
    first_RK = torch.full((len(at_RN), plan.slots + 1), count, device=device, dtype=torch.int64)
    first_RK = first_RK.scatter_reduce(1, slot_RN, at_RN, "amin")
    lead_RN = first_RK.gather(1, slot_RN).masked_fill(slot_RN == plan.slots, -1)

    # The same for the whole axis: who is nobody's member leads itself. One place past the end takes
    # what is no token.
    target = torch.where(valid_RN, row_R1 * count + at_RN, batch * count)
    places = torch.arange(count, device=device).expand(batch, count)
    lead = places if axis.filled_BK is None else places.masked_fill(~axis.filled_BK, -1)
    lead_BK = torch.cat([lead.flatten(), lead.new_zeros(1)]).scatter(
        0, target.flatten(), lead_RN.flatten()
    )
    lead_BK = lead_BK[:-1].view(batch, count)
    weight = torch.ones(batch * count + 1, device=device).scatter(
        0, target.flatten(), plan.weight_BN.flatten()
    )

    stays_BK = lead_BK == places
    left_B1 = stays_BK.sum(1, keepdim=True)
    number_BK = stays_BK.long().cumsum(1) - 1 + slots - left_B1
    slot_BK = torch.where(lead_BK < 0, -1, number_BK.gather(1, lead_BK.clamp_min(0)))
    index = torch.zeros(batch, slots + 1, device=device, dtype=torch.int64)
    index = index.scatter(1, torch.where(stays_BK, number_BK, slots), places)[:, :slots]
    mask = torch.arange(slots, device=device) >= slots - left_B1
    placed = Plan(slot_BK, weight[:-1].view(batch, count), mask, index)
    if plan.shares_BKN is None:
        return placed

    # All shares of the view's slots, where these have come to stand; one row and one column too
    # many take those of empty slots and of padding.
    number_RS = nn.functional.pad(number_BK, (0, 1), value=slots)[row_R1[:, 0]]
    row_RK = row_R1 * (slots + 1) + number_RS.gather(1, first_RK[:, :-1])
    column_RN = torch.where(valid_RN, at_RN, count)
    shares = nn.functional.pad(placed.matrix(), (0, 1, 0, 1)).flatten()
    target_RKN = row_RK[:, :, None] * (count + 1) + column_RN[:, None]
    shares = shares.scatter(0, target_RKN.flatten(), plan.shares_BKN.float().flatten())
    shares_BKN = shares.view(batch, slots + 1, count + 1)[:, :-1, :-1]
    return replace(placed, shares_BKN=shares_BKN)


def gather(x: Any, index_BK: Tensor, length: int) -> Any:
    """The tokens of that index of anything that goes along with the tokens; other things as they
    are.

    Knows [B,S], [B,S,D], rotary embeddings as tuples of such, and positions of several kinds
    [P,B,S]; a batch of one stands for all.
    """
    if isinstance(x, tuple):
        return tuple(gather(part, index_BK, length) for part in x)
    if not isinstance(x, Tensor):
        return x
    batch = len(index_BK)
    index = index_BK.to(x.device)
    if x.shape[-1] == length and x.ndim >= 2 and x.dtype in (torch.int64, torch.int32):
        wide = (*x.shape[:-2], batch, index.shape[1])
        return x.expand(*x.shape[:-2], batch, length).gather(-1, index.expand(wide))
    if x.ndim == 3 and x.shape[1] == length:
        return x.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return x


def to_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """A small tensor made on the host, on the device without the host's waiting for it."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
