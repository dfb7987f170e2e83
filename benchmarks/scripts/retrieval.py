"""Measure retrieval of pages with fewer vectors: index size, recall and NDCG.

    python benchmarks/scripts/retrieval.py train FOLDER [STEPS]
    python benchmarks/scripts/retrieval.py measure FOLDER ROWS.csv

A page is an image of scenes: four to ten coloured shapes, partly over one another, on a plain
ground. A query names two of them ("red circle blue star"); relevant are all pages that show both.
The model is a ColQwen2 of 0.25 million weights, trained from nothing, with pages of three sizes, on
this task alone. All reductions are applied to it as it is, without any training.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import pumer
from pumer._rows import append_rows
from pumer.lab.bench.page_index import (
    index_bytes,
    late_interaction,
    ndcg,
    pool_vectors,
    recall,
)
from pumer.lab.bench.records import environment
from pumer.lab.scenes.drawing import COLOURS, SHAPES, draw_scenes, patch_targets

SIDE, PATCH, WIDTH, LAYERS = 64, 8, 64, 3
BOS, IMAGE, START, END, PROMPT = 0, 1, 2, 3, 4
"""Ids; those of colours and shapes come behind them."""
COLOUR, SHAPE = 5, 5 + len(COLOURS)
VOCABULARY = SHAPE + len(SHAPES)
KINDS = len(COLOURS) * len(SHAPES)
PAGES, QUERIES = 400, 200
KEEP = {1 / 2: 48, 1 / 4: 32, 1 / 8: 24}
"""Shares of the image vectors, and pages in pixels that have about as many."""
TRAIN_SEED, TEST_SEED = 71, 72


def new_model() -> transformers.ColQwen2ForRetrieval:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            },
            "pad_token_id": None,
            "bos_token_id": BOS,
            "eos_token_id": BOS,
        },
        vision_config={
            "depth": LAYERS,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VOCABULARY,
    )
    return transformers.ColQwen2ForRetrieval(
        transformers.ColQwen2Config(vlm_config=config.to_dict(), embedding_dim=32)
    )


def draw(seed: int, index: range) -> tuple[Tensor, Tensor, Tensor]:
    """Pages [B,3,S,S] from -1 to 1, which kinds of objects they show, bool [B,KINDS], and the kind
    that covers most of every patch [B,N], -1 for the ground."""
    scenes = draw_scenes(seed, index, image_size=SIDE)
    kind_BK = scenes.colour * len(SHAPES) + scenes.shape
    shown = torch.zeros(len(index), KINDS + 1, dtype=torch.bool)
    shown.scatter_(1, kind_BK.masked_fill(~scenes.present, KINDS), True)
    colour, shape = patch_targets(scenes, PATCH)
    kind_BN = torch.where(colour > 0, (colour - 1) * len(SHAPES) + shape - 1, -1)
    return scenes.images.float() / 127.5 - 1, shown[:, :KINDS], kind_BN


def page_inputs(images: Tensor, side: int = SIDE) -> dict[str, Tensor]:
    """Of pages that are scaled to `side` first."""
    if side != SIDE:
        images = interpolate(images, size=(side, side), mode="area")
    cells, pages = side // PATCH, len(images)
    patches = images.unflatten(2, (cells, PATCH)).unflatten(4, (cells, PATCH))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(pages, cells**2, -1)
    ids = torch.tensor([BOS, START, *[IMAGE] * cells**2, END, PROMPT]).expand(pages, -1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, cells, cells]]).expand(pages, -1),
    }


def query_inputs(kinds_BQ: Tensor) -> dict[str, Tensor]:
    """Of queries that name these kinds of objects."""
    words = torch.stack([COLOUR + kinds_BQ // len(SHAPES), SHAPE + kinds_BQ % len(SHAPES)], -1)
    ids = torch.cat([torch.full((len(words), 1), BOS), words.flatten(1)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def two_of(shown: Tensor, generator: torch.Generator) -> Tensor:
    """Two kinds of objects of every page [B,2]; the same one twice where it shows one alone."""
    chance = torch.rand(shown.shape, generator=generator).masked_fill(~shown, -1)
    kinds = chance.topk(2, dim=1).indices
    return torch.where(shown.gather(1, kinds), kinds, kinds[:, :1])


def train(folder: Path, steps: int = 800, batch: int = 24) -> None:
    model = new_model().train()
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} million weights")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    begun = time.monotonic()
    for step in range(steps):
        images, shown, kind_BN = draw(TRAIN_SEED, range(step * batch, (step + 1) * batch))
        side = (SIDE, SIDE, 48, SIDE, SIDE, 32)[step % 6]
        kinds = two_of(shown, generator)
        pages = model(**page_inputs(images, side)).embeddings
        queries = model(**query_inputs(kinds)).embeddings[:, 1:]
        match = torch.einsum("qnd,pmd->qpnm", queries, pages).amax(3).sum(2)
        logits = match / 0.1
        relevant = shown[:, kinds].all(2).T
        hit = logits.masked_fill(~relevant, -torch.inf)
        loss = (logits.logsumexp(1) - hit.logsumexp(1)).mean()
        if side == SIDE:
            # Every patch of an object is to match the words for it: what a page that is read aloud
            # patch by patch teaches far sooner than which of a batch's pages is meant.
            words = model(**query_inputs(torch.arange(KINDS)[:, None])).embeddings[:, 1:].sum(1)
            logits_BNK = pages[:, 2:-2] @ words.T / 0.1
            loss = loss + cross_entropy(
                logits_BNK.flatten(0, 1), kind_BN.flatten(), ignore_index=-1
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            spent = time.monotonic() - begun
            print(f"step {step} side {side} loss {loss:.3f} after {spent:.0f} s", flush=True)
            model.save_pretrained(folder)


@dataclass(frozen=True)
class Row:
    """One way to make an index, and what it gives.

    Args:
        method: of it.
        vectors: of a page, on average.
        bytes_per_page: of the index, in half precision.
        recall_1, recall_5: share of queries with a relevant page among the first, percent.
        ndcg_10: of the first ten pages, percent.
        gflops: of a page, vision tower included; of pooling nothing is counted.
    """

    method: str
    vectors: float
    bytes_per_page: int
    recall_1: float
    recall_5: float
    ndcg_10: float
    gflops: float


def reducers(keep: float) -> dict[str, object]:
    """Reducers that leave this share of the image tokens."""
    return {
        "Random, before the language model": pumer.Random(prune=1 - keep),
        "DivPrune": pumer.DivPrune(keep=keep),
        "FoPru": pumer.FoPru(keep=keep),
        "HiPrune": pumer.HiPrune(keep=keep),
        "PuMer, merging alone, after layer 0": pumer.PuMer(
            prune=0, merge=min(0.5, 1 - keep), merge_text=0, layers=(0,)
        ),
    }


def measure(folder: Path, rows: Path) -> None:
    model = transformers.ColQwen2ForRetrieval.from_pretrained(folder).eval()
    images, shown, _ = draw(TEST_SEED, range(PAGES))
    kinds = two_of(shown[:QUERIES], torch.Generator().manual_seed(1))
    relevant = shown[:, kinds].all(2).T

    def vectors_of(inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            return pumer.vectors(model, **inputs)

    def index(side: int = SIDE) -> list[Tensor]:
        return [page for part in images.split(50) for page in vectors_of(page_inputs(part, side))]

    queries = [query[1:] for query in vectors_of(query_inputs(kinds))]
    image = (SIDE // PATCH) ** 2

    def row(method: str, pages: list[Tensor], gflops: float) -> None:
        scores = late_interaction(queries, pages)
        measured = Row(
            method,
            round(sum(map(len, pages)) / PAGES, 1),
            index_bytes(pages) // PAGES,
            round(recall(scores, relevant, 1), 1),
            round(recall(scores, relevant, 5), 1),
            round(ndcg(scores, relevant, 10), 1),
            round(gflops, 4),
        )
        print(measured, flush=True)
        append_rows(rows, [asdict(measured) | environment()])

    def gflops(side: int = SIDE) -> float:
        return 2 * pumer.report(model, text=4, image=(side // PATCH) ** 2).macs / 1e9

    stock = index()
    row("all vectors", stock, gflops())
    generator = torch.Generator().manual_seed(2)
    words = [torch.cat([page[:2], page[-2:]]) for page in stock]
    for keep in KEEP:  # both leave the vectors of words alone, as the reducers do
        count = round(image * keep)
        pooled = [pool_vectors(page[2:-2], count) for page in stock]
        pages = [torch.cat(pair) for pair in zip(words, pooled, strict=True)]
        row(f"hierarchical pooling of the vectors, {keep}", pages, gflops())
        drawn = [page[2:-2][torch.randperm(image, generator=generator)[:count]] for page in stock]
        pages = [torch.cat(pair) for pair in zip(words, drawn, strict=True)]
        row(f"random vectors, {keep}", pages, gflops())
    for keep, side in KEEP.items():
        row(f"smaller pages of {side} pixels", index(side), gflops(side))
        for method, reducer in reducers(keep).items():
            with pumer.reduced(model, reducer):
                row(f"{method}, {keep}", index(), gflops())


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, target, *more = sys.argv[1:]
    if command == "train":
        train(Path(target), *map(int, more))
    else:
        measure(Path(target), Path(*more))
