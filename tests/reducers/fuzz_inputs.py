"""Random tokens to reduce, such as some place in some model has, for `fuzz_reducers`.

Shape suffixes: B batch, H heads, N tokens, T text tokens, I image tokens, M keys of the context,
D channels, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random as Generator
from typing import Any

import torch
from fuzz_settings import DEPTH, members
from torch import Tensor

from pumer.reducers import EMBEDDINGS, Encoder, Reducer, Tokens
from pumer.reducers.tokens import Context, Embeddings, Grid

HEADS, CHANNELS = 2, 4
WIDTH = HEADS * CHANNELS
PARTS = ("encoder", "context", "embeddings")
"""Fields of `Tokens` that have tensors of their own."""


@dataclass(frozen=True)
class Batch:
    """Tokens, and what is real in each of their rows.

    Args:
        counts: (text, image) tokens of every row, structure tokens included.
        grids: rows and columns of patches of every row; None where the tokens have no grid.
        overflows: whether products of queries and keys may exceed the largest number or a softcap,
            as they would in the model: what comes out then depends on the order of a sum.
    """

    tokens: Tokens
    counts: tuple[tuple[int, int], ...]
    grids: tuple[Grid, ...] | None
    overflows: bool = False

    def indices(self, row: int) -> Tensor:
        """Where the real tokens of a row are, int64."""
        text, image = self.counts[row]
        return torch.cat([torch.arange(text), self.tokens.text + torch.arange(image)])

    def alone(self, row: int) -> Batch:
        """A row without its padding."""
        tokens, index = self.tokens, self.indices(row)
        text, image = self.counts[row]
        cut = {}
        for field in fields(tokens):
            value = getattr(tokens, field.name)
            if field.name == "attention_BHNN" and value is not None and tokens.cross:
                cut[field.name] = value[row : row + 1, :, :text, :image]
            elif field.name == "attention_BHNN" and value is not None:
                cut[field.name] = value[row : row + 1][:, :, index][..., index]
            elif field.name == "queries_BHNC" and value is not None and tokens.cross:
                cut[field.name] = value[row : row + 1, :, :text]
            elif field.name == "entered_BI" and value is not None:
                cut[field.name] = value[row : row + 1, value[row]]
            elif field.name == "question_BT" and value is not None:
                cut[field.name] = value[row : row + 1, :text]
            elif isinstance(value, Tensor):
                dim = field.name.rsplit("_", 1)[1].index("N")
                cut[field.name] = value[row : row + 1].index_select(dim, index)
        if tokens.encoder is not None:
            patches = max(image - tokens.num_prefix_tokens, 0)
            cut["encoder"] = Encoder(
                **{
                    field.name: value[row : row + 1].narrow(
                        field.name.rsplit("_", 1)[1].index("N"), 0, patches
                    )
                    for field in fields(Encoder)
                    if (value := getattr(tokens.encoder, field.name)) is not None
                }
            )
        if tokens.context is not None:
            context = tokens.context
            valid_M = context.valid_BM[row]
            cut["context"] = replace(
                context,
                keys_BHMC=context.keys_BHMC[row : row + 1][:, :, valid_M],
                valid_BM=context.valid_BM[row : row + 1, valid_M],
                place_BM=None
                if context.place_BM is None
                else context.place_BM[row : row + 1, valid_M],
            )
        if tokens.embeddings is not None:
            embeddings = tokens.embeddings
            valid_I = embeddings.valid_BI[row]
            cut["embeddings"] = Embeddings(
                embeddings.text_BTD[row : row + 1, :text],
                embeddings.image_BID[row : row + 1, valid_I],
                embeddings.valid_BI[row : row + 1, valid_I],
            )
        grids = None
        if self.grids is not None:
            grids = (self.grids[row],)
            patch_1N = torch.full_like(cut["mask_BN"], -1, dtype=torch.int64)
            patches = grids[0][0] * grids[0][1]
            patch_1N[:, text + image - patches :] = torch.arange(patches)
            cut |= {"patch_BN": patch_1N, "grid": grids[0]}
        return Batch(replace(tokens, text=text, **cut), (self.counts[row],), grids)


def tensors(tokens: Tokens) -> dict[str, Tensor]:
    """All tensors of some tokens, those of their encoder and context too, by name."""
    parts = {"": tokens} | {f"{name}.": getattr(tokens, name) for name in PARTS}
    return {
        num_prefix_tokens + field.name: value
        for num_prefix_tokens, part in parts.items()
        if part is not None
        for field in fields(part)
        if isinstance(value := getattr(part, field.name), Tensor)
    }


def with_values(tokens: Tokens, change: Callable[[str, Tensor], Tensor]) -> Tokens:
    """Tokens with every tensor of features or attention changed; masks, sizes and places stay."""
    changed = {
        name: change(name, value)
        for name, value in tensors(tokens).items()
        if value.is_floating_point() and name not in ("mask_BN", "sizes_BN", "gate_BN")
    }
    parts = {}
    for num_prefix_tokens in PARTS:
        inner = {
            name.split(".")[1]: value
            for name, value in changed.items()
            if name.startswith(num_prefix_tokens + ".")
        }
        if inner:
            parts[num_prefix_tokens] = replace(getattr(tokens, num_prefix_tokens), **inner)
    outer = {name: value for name, value in changed.items() if "." not in name}
    return replace(tokens, **outer, **parts)


PATTERNS = ["normal"] * 3 + [
    "ties",
    "equal",
    "zeros",
    "low-rank",
    "huge",
    "mixed",
    "tiny",
    "copies",
]
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16)
PADDING = {"zero": 0.0, "noise": 1.0, "huge": 1e30, "nan": torch.nan}
"""What the features at padding are multiplied by."""


def some_values(pattern: str, count: int, channels: int, seed: torch.Generator) -> Tensor:
    """Features of `count` tokens, float32 [N,D], up to 1e30."""
    x_ND = torch.randn(count, channels, generator=seed)
    if pattern == "ties":
        return torch.randint(-1, 2, (count, channels), generator=seed).float()
    if pattern == "equal":
        return x_ND[:1].expand(count, channels).clone()
    if pattern == "zeros":
        return x_ND * (torch.rand(count, 1, generator=seed) < 0.3)
    if pattern == "low-rank":
        return x_ND[:, :1] @ torch.randn(1, channels, generator=seed)
    if pattern == "huge":
        return (x_ND * 3e29).clamp(-1e30, 1e30)
    if pattern == "mixed":
        return x_ND * 10 ** (torch.rand(count, 1, generator=seed) * 56 - 28)
    if pattern == "tiny":
        return x_ND * 1e-30
    if pattern == "copies" and count:
        return x_ND[torch.randint(0, min(3, count), (count,), generator=seed)]
    return x_ND


@dataclass(frozen=True)
class Features:
    """Random features of the rows of a batch.

    Args:
        dtype: of all of them.
        patterns: one of `PATTERNS` for every row.
        padding: what stands at padding, one of `PADDING`.
        seed: of all random numbers.
    """

    dtype: torch.dtype
    patterns: list[str]
    padding: str
    seed: torch.Generator

    @property
    def limit(self) -> float:
        """The largest absolute value; sums of some of these are finite."""
        return 1e30 if self.dtype != torch.float16 else 1e4

    def of(self, valid_BN: Tensor, channels: int) -> Tensor:
        """Features [B,N,D]."""
        count = valid_BN.shape[1]
        rows = [some_values(pattern, count, channels, self.seed) for pattern in self.patterns]
        x_BND = torch.stack(rows)
        noise_BND = torch.randn(x_BND.shape, generator=self.seed) * PADDING[self.padding]
        x_BND = torch.where(valid_BN[..., None], x_BND, noise_BND)
        return x_BND.clamp(-self.limit, self.limit).to(self.dtype)

    def by_head(self, valid_BN: Tensor) -> Tensor:
        """Features [B,H,N,C]."""
        return torch.stack([self.of(valid_BN, CHANNELS) for _ in range(HEADS)], 1)


def some_count(rng: Generator, least: int, most: int) -> int:
    """A number of tokens, small ones more often."""
    few, many = rng.randint(least, 6), rng.randint(least, most)
    return rng.choice([least, least + 1, few, few, many, many, many])


def some_batch(reducer: Reducer, layer: int, rng: Generator) -> Batch:
    """Tokens such as some place in some model has when this reducer acts in this layer.

    Everywhere: one to four rows with their padding at the end of each modality. Joint encoders
    have structure tokens and see all; in a language model attention is mostly causal, the words
    stand before and after the image, and there may be a context; a vision tower has no text.
    """
    seed = torch.Generator().manual_seed(rng.randrange(2**40))
    inside = layer != EMBEDDINGS
    joint = (
        reducer.traits.official or reducer.traits.learned is not None
    )  # in joint encoders and nowhere else
    in_decoder = inside and not joint and rng.random() < 0.5
    num_prefix_tokens = 0 if in_decoder or reducer.traits.needs_encoder else rng.choice([0, 1])
    num_prefix_tokens = 1 if joint else num_prefix_tokens
    cross = inside and num_prefix_tokens == 1 and rng.random() < 0.3
    rows = rng.randint(1, 4)
    no_text = not joint and not cross and rng.random() < 0.1
    batch = some_lengths(reducer, layer, num_prefix_tokens, rows, no_text, rng)
    mask_BN, text = batch.tokens.mask_BN, batch.tokens.text
    more: dict[str, Any] = {"cross": cross}
    if rng.random() < 0.5:
        sizes_BN = torch.randint(1, 5, mask_BN.shape, generator=seed).float()
        more["sizes_BN"] = sizes_BN * (mask_BN if rng.random() < 0.5 else 1)

    features = Features(
        dtype=rng.choice(DTYPES),
        patterns=[rng.choice(PATTERNS) for _ in range(rows)],
        padding=rng.choice(
            ["zero", "noise", "noise", "huge"] + ["nan"] * (not reducer.traits.official)
        ),
        seed=seed,
    )
    overflows = inside and rng.random() < 0.05
    if in_decoder:
        more |= some_sequence(batch, features, rng)
        context = more["context"]
        capped = context is not None and context.softcap is not None
        overflows |= capped and not {"huge", "mixed"}.isdisjoint(features.patterns)
    more["states_BND"] = features.of(mask_BN, WIDTH)
    if inside:
        more |= some_attention(reducer, batch, cross, overflows, features)
        if reducer.traits.needs_input:
            more["input_BND"] = features.of(mask_BN, WIDTH)
    if layer > 0 and rng.random() < 0.5:
        more["entered_BI"] = some_entered(batch, rng)
    if num_prefix_tokens == 0 and rng.random() < 0.5:
        some_BT = torch.rand(rows, text, generator=seed) < 0.5
        more["question_BT"] = mask_BN[:, :text] & some_BT
    if in_decoder and reducer.traits.needs_embeddings and rng.random() < 0.8:
        # Of the whole prompt: earlier layers may have dropped some image tokens.
        gone_BI = torch.rand(rows, rng.randint(0, 5), generator=seed) < 0.5
        valid_BI = torch.cat([mask_BN[:, text:], gone_BI], 1)
        text_BTD = features.of(mask_BN[:, :text], WIDTH)
        more["embeddings"] = Embeddings(text_BTD, features.of(valid_BI, WIDTH), valid_BI)
    if reducer.traits.needs_encoder and not inside:
        more["encoder"] = some_encoder(
            reducer.traits.needs_encoder, mask_BN[:, text + num_prefix_tokens :], features, rng
        )
    if reducer.traits.learned is not None:
        with torch.random.fork_rng():
            torch.manual_seed(rng.randrange(99))
            parts = reducer.traits.learned.parts(WIDTH, HEADS, DEPTH, cross)
            more["part"] = parts[str(layer)].eval().to(features.dtype)
            for parameter in more["part"].parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    official = any(getattr(part, "official", False) for part in members(reducer))
    if official and rng.random() < 0.5:  # fractional masks
        more["mask_BN"] = mask_BN * torch.rand(mask_BN.shape, generator=seed).clamp_min(1e-3)
    return replace(batch, tokens=replace(batch.tokens, **more), overflows=overflows)


def some_lengths(
    reducer: Reducer, layer: int, num_prefix_tokens: int, rows: int, no_text: bool, rng: Generator
) -> Batch:
    """A batch without features: its lengths, masks and grids; every row has some token."""
    by_grid = rng.random() < 0.4 or any(
        part.name in ("pool", "hiprune") or getattr(part, "strategy", "") == "row"
        for part in members(reducer)
    )
    texts = [0 if no_text else some_count(rng, num_prefix_tokens, 40) for _ in range(rows)]
    grids = None
    if by_grid:
        grids = tuple((rng.randint(1, 7), rng.randint(1, 8)) for _ in range(rows))
        images = [num_prefix_tokens + high * wide for high, wide in grids]
    else:
        no_image = rng.random() < 0.05
        images = [
            num_prefix_tokens + (0 if no_image else some_count(rng, 0, 60)) for _ in range(rows)
        ]
        images = [image or int(not text) for text, image in zip(texts, images, strict=True)]
    counts = tuple(zip(texts, images, strict=True))
    spare = rng.choice([0, 0, rng.randint(1, 5)])
    text = 0 if no_text else max(texts) + spare
    image = max(images) + spare
    grid, patch_BN = None, None
    if grids is not None:
        grid, patch_BN, image = raster(grids, text, num_prefix_tokens, rng)
    mask_BN = torch.zeros(rows, text + image, dtype=torch.bool)
    for row, (words, patches) in enumerate(counts):
        mask_BN[row, :words] = True
        mask_BN[row, text : text + patches] = True
    sizes_BN = torch.ones(mask_BN.shape)
    tokens = Tokens(mask_BN, text, sizes_BN, layer, num_prefix_tokens, grid=grid, patch_BN=patch_BN)
    return Batch(tokens, counts, grids)


def some_sequence(batch: Batch, features: Features, rng: Generator) -> dict[str, Any]:
    """Places and context of a language model, mostly."""
    rows, count = batch.tokens.mask_BN.shape
    place_BN = context = None
    if rng.random() < 0.8:
        place_BN = places(batch.counts, batch.tokens.text, count, rng, features.seed)
    if rng.random() < 0.5:
        shape = (rows, rng.randint(0, 8))
        valid_BM = torch.rand(shape, generator=features.seed) < 0.7
        keys_BHMC = features.by_head(valid_BM)
        place_BM = window = None
        if place_BN is not None:
            place_BM = torch.randint(0, count + 9, shape, generator=features.seed)
            window = rng.choice([None, None, 3, 50])
        context = Context(keys_BHMC, valid_BM, place_BM, window, rng.choice([None, None, 5.0]))
    return {"place_BN": place_BN, "context": context}


def some_attention(
    reducer: Reducer, batch: Batch, cross: bool, overflows: bool, features: Features
) -> dict[str, Any]:
    """Queries and keys of a layer, and its attention probabilities if the reducer needs them."""
    mask_BN, text = batch.tokens.mask_BN, batch.tokens.text
    rows, count = mask_BN.shape
    keys_BHNC, queries_BHNC = features.by_head(mask_BN), features.by_head(mask_BN)
    largest = 1e5 if features.dtype != torch.float16 else 3
    largest = features.limit if overflows else largest
    queries_BHNC = queries_BHNC.clamp(-largest, largest)[:, :, : text if cross else count]
    attention_BHNN = None
    if reducer.traits.needs_attention:
        first = text if cross else 0
        shape = (rows, HEADS, queries_BHNC.shape[2], count - first)
        logits_BHNN = torch.randn(shape, generator=features.seed)
        logits_BHNN = logits_BHNN.masked_fill(~mask_BN[:, None, None, first:], -1e9)
        attention_BHNN = logits_BHNN.softmax(-1).to(features.dtype)
    return {
        "queries_BHNC": queries_BHNC,
        "keys_BHNC": keys_BHNC,
        "attention_BHNN": attention_BHNN,
    }


def some_entered(batch: Batch, rng: Generator) -> Tensor:
    """Mask of the image tokens that entered the first layer: those that are there, and more."""
    tokens = batch.tokens
    gone = [rng.choice([0, 1, rng.randint(0, 40)]) for _ in batch.counts]
    images = [image for _, image in batch.counts]
    entered = [
        image - tokens.num_prefix_tokens + more for image, more in zip(images, gone, strict=True)
    ]
    spare = rng.choice([0, rng.randint(0, 5)])
    image = tokens.mask_BN.shape[1] - tokens.text
    width = max(max(entered) + spare, image - tokens.num_prefix_tokens)
    return torch.arange(width) < torch.tensor(entered)[:, None]


def raster(
    grids: tuple[Grid, ...], text: int, num_prefix_tokens: int, rng: Generator
) -> tuple[Grid, Tensor, int]:
    """The grid that all fit into, every token's patch in it, and the length of the image axis."""
    high, wide = (max(sides) for sides in zip(*grids, strict=True))
    padded = rng.random() < 0.5  # padding names the patches that are left, as in ViLT, or none
    patches = high * wide if padded else max(rows * columns for rows, columns in grids)
    patch_BN = torch.full((len(grids), text + num_prefix_tokens + patches), -1)
    for row, (rows, columns) in enumerate(grids):
        inside = torch.zeros(high, wide, dtype=torch.bool)
        inside[:rows, :columns] = True
        numbers = (~inside.flatten()).to(torch.uint8).argsort(stable=True)
        numbers = numbers if padded else numbers[: rows * columns]
        patch_BN[row, text + num_prefix_tokens : text + num_prefix_tokens + len(numbers)] = numbers
    return (high, wide), patch_BN, num_prefix_tokens + patches


def places(
    counts: tuple[tuple[int, int], ...],
    text: int,
    count: int,
    rng: Generator,
    seed: torch.Generator,
) -> Tensor:
    """Places in a sequence where the image stands before, between or behind the words."""
    place_BN = torch.randint(0, count + 9, (len(counts), count), generator=seed)
    for row, (words, patches) in enumerate(counts):
        before = rng.choice([0, words, rng.randint(0, words)])
        sequence = sorted(rng.sample(range(words + patches + 9), words + patches))
        image = sequence[before : before + patches]
        place_BN[row, :words] = torch.tensor(sequence[:before] + sequence[before + patches :])
        place_BN[row, text : text + patches] = torch.tensor(image)
    return place_BN


def some_encoder(
    needs: frozenset[str], valid_BI: Tensor, features: Features, rng: Generator
) -> Encoder:
    """What a vision encoder says; the shape is in the name of every field."""
    facts = {}
    for name in sorted(needs):
        if name.endswith("_BN"):
            sharpness = rng.choice([0.0, 1.0, 1.0, 10.0, 200.0])
            logits_BI = torch.randn(valid_BI.shape, generator=features.seed) * sharpness
            facts[name] = logits_BI.masked_fill(~valid_BI, -1e9).softmax(-1)
        else:
            facts[name] = features.of(valid_BI, CHANNELS if name.endswith("C") else 6)
    return Encoder(**facts)
