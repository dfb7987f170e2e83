"""Batches of pictures as an adapter hands them to a reducer, padded with rubbish; and one picture
of them alone."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from pumer.reducers import EMBEDDINGS, Encoder, Tokens
from pumer.reducers.tokens import Embeddings

GRIDS, WORDS = ((6, 5), (4, 4), (2, 7), (1, 3)), (7, 1, 5, 3)
FULL = {"grids": ((6, 6),), "words": (5,), "padding": 0}
"""One picture without padding."""


@dataclass(frozen=True)
class Picture:
    """One picture and its text in numpy, without padding: what the slow loops read."""

    states: np.ndarray
    words: np.ndarray
    features: np.ndarray
    attention: np.ndarray
    received: np.ndarray
    tower_keys: np.ndarray
    given: np.ndarray
    last_attention: np.ndarray
    last_keys: np.ndarray
    middle_received: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    sizes: np.ndarray
    grid: tuple[int, int]
    before: np.ndarray | None = None
    places: np.ndarray | None = None
    embeddings: np.ndarray | None = None

    @property
    def count(self):
        return len(self.states)


def batch(seed, grids=GRIDS, words=WORDS, padding=2, width=40, layer=EMBEDDINGS, causal=False):
    """The tokens of some pictures with their texts; everything about padding is noise.

    In a causal one every picture stands somewhere among its words, and embeddings are known.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    text, image = max(words) + padding, max(rows * columns for rows, columns in grids) + padding
    grid = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    mask = torch.zeros(len(grids), text + image, dtype=torch.bool)
    patch = torch.full(mask.shape, -1)
    for row, (rows, columns) in enumerate(grids):
        mask[row, : words[row]] = True
        mask[row, text : text + rows * columns] = True
        raster = torch.arange(grid[0] * grid[1]).view(grid)[:rows, :columns].flatten()
        patch[row, text : text + rows * columns] = raster
    near = noise(len(grids), text + image, width)
    inside = layer >= 0
    places = embeddings = None
    if causal:
        places = torch.randint(0, 99, mask.shape, generator=generator)
        for row, (rows, columns) in enumerate(grids):
            before = int(torch.randint(0, words[row] + 1, (), generator=generator))
            words_at, image_at = torch.arange(words[row]), torch.arange(rows * columns)
            places[row, : words[row]] = words_at + rows * columns * (words_at >= before)
            places[row, text : text + rows * columns] = before + image_at
        # Of the whole image, although it may have lost some tokens since.
        embedded = noise(len(grids), text + image, width) / 2
        embeddings = Embeddings(embedded[:, :text], embedded[:, text:], mask[:, text:])
    return Tokens(
        mask_BN=mask,
        text=text,
        sizes_BN=torch.randint(1, 4, mask.shape, generator=generator).float()
        if inside
        else torch.ones(mask.shape),
        layer=layer,
        num_prefix_tokens=0,
        grid=grid,
        patch_BN=patch,
        states_BND=near + near.mean(1, keepdim=True) * 4,
        queries_BHNC=noise(len(grids), 3, text + image, 8) if inside else None,
        keys_BHNC=noise(len(grids), 3, text + image, 8) if inside else None,
        encoder=Encoder(
            features_BND=noise(len(grids), image, width // 2) + 1,
            class_attention_BN=noise(len(grids), image).mul(2).exp() / image / 8,
            received_BN=noise(len(grids), image).exp() / image / 2,
            keys_BNC=noise(len(grids), image, 8),
            queries_BNC=noise(len(grids), image, 8),
            given_BN=noise(len(grids), image).exp() / image / 2,
            last_class_attention_BN=noise(len(grids), image).mul(2).exp() / image / 8,
            last_keys_BNC=noise(len(grids), image, 12),
            middle_received_BN=noise(len(grids), image).exp() / image / 2,
        ),
        input_BND=noise(len(grids), text + image, width) if inside else None,
        place_BN=places,
        embeddings=embeddings,
    )


def alone(tokens, row, grids=GRIDS):
    """The tokens of one picture of the batch, without padding."""
    kept = tokens.mask_BN[row]
    image = kept[tokens.text :]
    rows = slice(row, row + 1)
    grid = grids[row]
    text = int(kept[: tokens.text].sum())
    raster = torch.cat([torch.full((text,), -1), torch.arange(grid[0] * grid[1])])[None]
    encoder = Encoder(**{name: value[rows, image] for name, value in vars(tokens.encoder).items()})
    heads = {
        name: None if getattr(tokens, name) is None else getattr(tokens, name)[rows, :, kept]
        for name in ("queries_BHNC", "keys_BHNC")
    }
    embeddings = tokens.embeddings
    if embeddings is not None:
        embeddings = Embeddings(
            embeddings.text_BTD[rows, :text],
            embeddings.image_BID[rows, image],
            embeddings.valid_BI[rows, image],
        )
    return replace(
        tokens,
        place_BN=None if tokens.place_BN is None else tokens.place_BN[rows, kept],
        embeddings=embeddings,
        mask_BN=tokens.mask_BN[rows, kept],
        sizes_BN=tokens.sizes_BN[rows, kept],
        states_BND=tokens.states_BND[rows, kept],
        input_BND=None if tokens.input_BND is None else tokens.input_BND[rows, kept],
        text=text,
        grid=grid,
        patch_BN=raster,
        encoder=encoder,
        **heads,
    )


def picture(tokens, row, grids=GRIDS):
    """The same in numpy, in double precision."""
    one = alone(tokens, row, grids)

    def array(x):
        return np.zeros((1, 0)) if x is None else x[0].double().numpy()

    states = array(one.states_BND)
    encoder, embedded = one.encoder, None
    if one.embeddings is not None:
        embedded = array(torch.cat([one.embeddings.text_BTD, one.embeddings.image_BID], 1))
    return Picture(
        states=states[one.text :],
        words=states[: one.text],
        features=array(encoder.features_BND),
        attention=array(encoder.class_attention_BN),
        received=array(encoder.received_BN),
        tower_keys=array(encoder.keys_BNC),
        given=array(encoder.given_BN),
        last_attention=array(encoder.last_class_attention_BN),
        last_keys=array(encoder.last_keys_BNC),
        middle_received=array(encoder.middle_received_BN),
        queries=array(one.queries_BHNC),
        keys=array(one.keys_BHNC),
        sizes=array(one.sizes_BN)[one.text :],
        grid=one.grid,
        before=array(one.input_BND)[one.text :],
        places=None if one.place_BN is None else one.place_BN[0].numpy(),
        embeddings=embedded,
    )


def shares(plan, tokens, row):
    """What each filled slot of the image of a row holds, as {image token: share}; text must be as
    it was."""
    text = tokens.text
    assert plan.slot_BN[row, :text].tolist() == list(range(text))
    assert torch.equal(plan.mask_BK[row, :text], tokens.mask_BN[row, :text])
    slots = plan.mask_BK[row, text:]
    filled = int(slots.sum())
    assert slots[:filled].all()
    members = [{} for _ in range(filled)]
    for token, slot in enumerate(plan.slot_BN[row, text:].tolist()):
        if tokens.mask_BN[row, text + token] and slot >= 0:
            members[slot - text][token] = float(plan.weight_BN[row, text + token])
    return members


def mixture(plan, tokens, row):
    """The matrix of a plan's shares for the image of a row: filled slots x real image tokens."""
    text = tokens.text
    slots, real = plan.mask_BK[row, text:].bool(), tokens.mask_BN[row, text:]
    return plan.matrix()[row, text:, text:][slots][:, real].double().numpy()


def kept(plan, tokens, row):
    """The image tokens that a plan that only drops keeps of a row, in their order."""
    assert plan.index_BK is not None
    members = shares(plan, tokens, row)
    assert all(list(member.values()) == [1.0] for member in members)
    return [next(iter(member)) for member in members]
