"""Seam B: between the vision tower and the language model, where every image is a row of its own.

Shape suffixes: B samples, R images, P patches, N tokens of a view, T text tokens, I image tokens, D
channels, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pumer.adapters.decoder.prompt import Axis, Picture, View, to_device
from pumer.reducers import EMBEDDINGS, Tokens
from pumer.reducers.tokens import Encoder, Grid


@dataclass(frozen=True)
class Row:
    """What a reducer chooses from at one time: an image, or a crop that has a budget of its own.

    Args:
        sample: whose it is.
        at_I: its patches among all those of the sample, int64 on the host.
        grid: as for `Picture`.
        encoder: as for `Picture`.
    """

    sample: int
    at_I: Tensor
    grid: Grid | None
    encoder: Encoder | None


def rows(pictures: Sequence[Picture], owner: Sequence[int], per_crop: bool) -> list[Row]:
    """A row for every image of these samples, or for every crop."""
    patches: dict[int, int] = {}
    result = []
    for picture, sample in zip(pictures, owner, strict=True):
        first = patches.get(sample, 0)
        patches[sample] = first + picture.patches
        if not per_crop or picture.crop_I is None:
            at_I = torch.arange(first, patches[sample])
            result.append(Row(sample, at_I, picture.grid, picture.encoder))
            continue
        for crop in picture.crop_I.unique().tolist():
            at_I = (picture.crop_I == crop).nonzero()[:, 0]
            encoder = None if picture.encoder is None else picture.encoder.at(at_I)
            result.append(Row(sample, first + at_I, None, encoder))
    return result


def view(axis: Axis, rows: Sequence[Row], states_BSD: Tensor, causal: bool) -> View:
    """What a reducer sees before the first layer: every row with the text of its sample, which
    stays.

    Args:
        axis: of the prompts.
        rows: of their images, in order.
        states_BSD: embeddings.
        causal: whether a token of the prompt sees only those before it.
    """
    device = axis.index_BK.device
    at_BN, valid_BN = axis.view()
    text, _ = axis.lengths
    owner = [row.sample for row in rows]
    row_R = to_device(owner, device)
    own_RI = to_device(pad_sequence([row.at_I for row in rows], True, padding_value=-1), device)
    at_RN = torch.cat([at_BN[row_R, :text], at_BN[row_R, text:].gather(1, own_RI.clamp_min(0))], 1)
    valid_RN = torch.cat([valid_BN[row_R, :text], own_RI >= 0], 1)
    grid, patch_RI = raster([row.grid for row in rows], device)
    flat = (row_R[:, None] * axis.index_BK.shape[1] + at_RN).flatten()
    tokens = Tokens(
        mask_BN=valid_RN,
        text=text,
        sizes_BN=axis.sizes_BK.flatten()[flat].view(at_RN.shape),
        layer=EMBEDDINGS,
        num_prefix_tokens=0,
        grid=grid,
        patch_BN=None if patch_RI is None else nn.functional.pad(patch_RI, (text, 0), value=-1),
        states_BND=states_BSD.flatten(0, 1)[flat].view(*at_RN.shape, -1),
        place_BN=axis.index_BK.flatten()[flat].view(at_RN.shape) if causal else None,
        question_BT=axis.question_BK.flatten()[flat].view(at_RN.shape)[:, :text]
        & valid_RN[:, :text],
        encoder=_encoder(rows, device),
    )
    own_RN = valid_RN & (torch.arange(at_RN.shape[1], device=device) >= text)
    return View(tokens, at_RN, own_RN, owner)


def by_sample(
    axis: Axis, owner: Sequence[int], counts: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """(text, image) tokens of every sample, from those of rows that each belong to a sample:
    images, or samples."""
    texts, images = [text for text, _ in axis.counts], [0] * len(axis.counts)
    for row, (text, image) in zip(owner, counts, strict=True):
        texts[row] = text
        images[row] += image
    return tuple(zip(texts, images, strict=True))


def raster(grids: Sequence[Grid | None], device: torch.device) -> tuple[Grid | None, Tensor | None]:
    """The smallest grid that all these fit into, and every patch's number in it [R,I]; None if one
    is not known."""
    if any(grid is None for grid in grids):
        return None, None
    rows, columns = (max(sides) for sides in zip(*filter(None, grids), strict=True))
    numbers = [
        torch.arange(rows * columns).view(rows, columns)[:r, :c].flatten()
        for r, c in filter(None, grids)
    ]
    return (rows, columns), to_device(
        pad_sequence(numbers, batch_first=True, padding_value=-1), device
    )


def _encoder(rows: Sequence[Row], device: torch.device) -> Encoder | None:
    """What is known of all rows, where the language model is: the vision tower may be elsewhere."""

    def padded(values: list[Tensor]) -> Tensor:
        wide = (
            values[0]
            if len(values) == 1
            else pad_sequence([value[0] for value in values], batch_first=True)
        )
        return wide.to(device)

    return _joined([row.encoder for row in rows], padded)


def _joined(
    encoders: Sequence[Encoder | None], join: Callable[[list[Tensor]], Tensor]
) -> Encoder | None:
    """One for several, every field joined; None if one of them is not known."""
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


def assign(
    pictures: Sequence[Picture], placeholders: Sequence[int]
) -> tuple[list[Picture], list[int]]:
    """The pictures of a batch in order and the sample of each, from the placeholders of every
    sample.

    Beams and returned sequences repeat samples, and their pictures with them.

    Raises:
        ValueError: where placeholders and pictures do not match.
    """
    have, need = sum(placeholders), sum(picture.length for picture in pictures)
    copies, odd = divmod(have, need) if need else (0, 1)
    mismatch = ValueError(
        f"the prompts have {have} image placeholders and the images {need} features: give every "
        "image its own placeholders, all in one prefill (leave prefill_chunk_size unset)"
    )
    if odd or not copies or len(placeholders) % copies:
        raise mismatch
    joined: list[Picture] = []
    owner: list[int] = []
    first = 0
    for row, count in enumerate(placeholders):
        if row % copies == 0:
            last = first
            while last < len(pictures) and count > sum(
                picture.length for picture in pictures[first:last]
            ):
                last += 1
            row_images, first = pictures[first:last], last
        if sum(picture.length for picture in row_images) != count:
            raise mismatch
        joined += row_images
        owner += [row] * len(row_images)
    return joined, owner


@dataclass(frozen=True)
class Tiles:
    """Crops that are pictures of their own to the vision tower, and parts of one image to the
    prompt.

    Args:
        joined_P: bool, whether each crop belongs to the image of the one before it.
        between_BS: bool, tokens between crops of one image.
    """

    joined_P: Tensor
    between_BS: Tensor

    @classmethod
    def of(cls, image_BS: Tensor, tile: int, features: int, ids_BS: Tensor | None) -> Tiles:
        """Crops of `tile` placeholders each.

        Those are of one image that follow upon each other without a token in between. Where there
        are tokens in between (`ids_BS` given), every image ends with a crop that has the same token
        before it: that which the last crop of the sample has.
        """
        length = image_BS.shape[1]
        flat = (~image_BS).flatten().to(torch.uint8).argsort(stable=True)[:features]
        first_P, last_P = flat[::tile], flat[tile - 1 :: tile]
        row_P = first_P // length
        same_P = row_P[1:] == row_P[:-1]
        if ids_BS is None:
            same_P = same_P & (first_P[1:] == last_P[:-1] + 1)
        else:
            label_P = ids_BS.flatten()[(first_P - 1).clamp_min(0)]
            final_P = torch.searchsorted(row_P, row_P, right=True) - 1
            same_P = same_P & (label_P != label_P[final_P])[:-1]
        steps = torch.zeros(image_BS.numel() + 1, dtype=torch.int64, device=image_BS.device)
        steps = steps.scatter_add(0, last_P[:-1] + 1, same_P.long()).scatter_add(
            0, first_P[1:], -same_P.long()
        )
        between = steps[:-1].cumsum(0).bool().view_as(image_BS)
        return cls(nn.functional.pad(same_P, (1, 0)), between)


def shift(x_BS: Tensor, step: int) -> Tensor:
    """Every mark `step` places further on, or back."""
    if step == 0:
        return x_BS
    return (
        nn.functional.pad(x_BS[:, :-step], (step, 0))
        if step > 0
        else nn.functional.pad(x_BS[:, -step:], (0, -step))
    )


def join(
    pictures: Sequence[Picture], owner: Sequence[int], joined: Sequence[int]
) -> tuple[list[Picture], list[int]]:
    """Images of one or several crops, and the sample of each."""
    groups: list[list[int]] = []
    for crop_index, with_last in enumerate(joined):
        if with_last and groups:
            groups[-1].append(crop_index)
        else:
            groups.append([crop_index])
    images = []
    for group in groups:
        parts = [pictures[crop_index] for crop_index in group]
        if len(parts) == 1:
            images += parts
            continue
        encoder = _joined([part.encoder for part in parts], partial(torch.cat, dim=1))
        lengths = torch.tensor([part.length for part in parts])
        crop_I = torch.arange(len(parts)).repeat_interleave(lengths)
        images.append(Picture(int(lengths.sum()), encoder=encoder, crop_I=crop_I))
    return images, [owner[group[0]] for group in groups]


def patches(image_BS: Tensor, pictures: Sequence[Picture]) -> Tensor:
    """Which placeholders are patches."""
    if all(picture.structure is None for picture in pictures):
        return image_BS
    flat = [
        torch.ones(picture.length, dtype=torch.bool)
        if picture.structure is None
        else ~picture.structure
        for picture in pictures
    ]
    return torch.zeros_like(image_BS).masked_scatter(
        image_BS, to_device(torch.cat(flat), image_BS.device)
    )
