"""`pumer score` and `pumer bench pairs`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pumer.commands.common import ReducerSettings, open_model, open_task, print_metrics
from pumer.data.images import BrokenImageError
from pumer.score import Job, stream_pairs
from pumer.score.measure import measure
from pumer.score.run import Engine
from pumer.tasks import get
from pumer.tasks.retrieval import Pool, recalls, recalls_in_folds


def score_(
    model: str,
    task: str | dict[str, Any],
    out: str,
    split: str = "test",
    reducer: ReducerSettings = None,
    chunk_images: int = 32,
    chunk_texts: int = 512,
    batch_size: int = 64,
    limit: int | None = None,
    folds: int = 1,
    engine: Engine = "plain",
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Score every image of a retrieval task with every caption, and say how well that finds the right ones.

    Stopped at any moment and started again with the same options, it goes on where it was. Under torchrun the devices
    of this machine share the work.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name, or `{"name": ..., "root": ..., ...}`.
        out: folder for the scores: `scores.npy`, float32 [images, captions], once they are complete.
        split: which part of the task's data.
        reducer: a preset, a reducer's name, or `{"reducer": ..., setting: value}`; the model's own if not given.
        chunk_images: images of a chunk; a chunk is what is lost when the command is stopped.
        chunk_texts: captions of a chunk.
        batch_size: captions that meet an image at a time.
        limit: only the first so many images, and their captions.
        folds: share the images out in so many folds, rank within each, and take the mean: 5 for COCO 1K.
        engine: "ray" spreads the work over a Ray cluster.
        workers: of Ray; its GPUs, or 2, if not given.
        address: of the Ray cluster; one is started on this machine if not given.
    """
    name = task if isinstance(task, str) else str(task.get("name"))
    if not hasattr(get(name), "pool"):
        raise ValueError(f"the task {name} is not one of retrieval: it has no pool of captions to score")
    net = open_model(model, reducer)
    if engine == "plain" and torch.cuda.is_available():
        net.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    collator = open_task(model, net, task)
    retrieval: Any = collator.task
    pool = _first(retrieval.pool(split), limit)
    if folds < 1 or len(pool.images) % folds:
        raise ValueError(f"folds: {len(pool.images)} images do not make {folds} equal folds")
    job = Job(net, pool.images, pool.captions, collator.text, collator.image, batch_size, chunk_images, chunk_texts)
    console = Console()
    try:
        scores = stream_pairs(
            job, out, engine=engine, workers=workers, address=address, progress=True, say=console.print
        )
    except BrokenImageError as error:
        raise ValueError(f"{error} Images count from 0 in the order of {split}.") from error
    if os.environ.get("RANK", "0") != "0":
        return
    print_metrics(
        f"{model} on {collator.task.name} {split}: {len(pool.images)} x {len(pool.captions)} pairs"
        + (f", mean of {folds} folds" if folds > 1 else ""),
        recalls_in_folds(scores, pool.image_of, folds) if folds > 1 else recalls(scores, pool.image_of),
    )


def bench_pairs(
    model: str = "meter",
    reducers: list[ReducerSettings] | None = None,
    images: int = 100,
    texts: int = 500,
    rows: int | None = None,
    plain_pairs: int = 64,
    batch_size: int = 8,
    runs: int = 3,
    record: str | None = None,
) -> None:
    """Time scoring of a pool, towers once, against the plain loop over its pairs, without and with reducers.

    Args:
        model: a retrieval model of random weights and true architecture: meter or vilt.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's retrieval preset if not
            given.
        images: of the pool.
        texts: of the pool.
        rows: images that are really scored, each with all texts; all of them if not given.
        plain_pairs: pairs that the plain loop is timed on.
        batch_size: pairs at a time, of both.
        runs: of everything, in turns.
        record: CSV file to add the rows to.
    """
    wanted = [spec for spec in reducers or [f"{model}-retrieval"] if spec is not None]
    table = Table(title=f"{model}: {images} images x {texts} texts, batches of {batch_size}")
    for column in ("reducer", "", "pairs/s", "x plain", "x plain, unreduced", "largest difference"):
        table.add_column(column, justify="right" if column else "left")
    for row in measure(model, wanted, images, texts, rows, plain_pairs, batch_size, runs, record):
        times = (f"{row[column]:.2f}" for column in ("pairs_per_second", "x_plain", "x_unreduced"))
        name = json.loads(row["reducer"])["reducer"] if row["reducer"] else "none"
        table.add_row(name, row["way"], *times, f"{row['difference']:.1e}")
    Console().print(table)


def _first(pool: Pool, limit: int | None) -> Pool:
    """The first images of a pool and their captions."""
    if limit is None or limit >= len(pool.images):
        return pool
    if limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1")
    kept = (pool.image_of < limit).nonzero()[0].tolist()
    return replace(
        pool,
        images=pool.images[:limit],
        image_ids=pool.image_ids[:limit],
        captions=[pool.captions[caption] for caption in kept],
        caption_ids=[pool.caption_ids[caption] for caption in kept],
        image_of=pool.image_of[kept],
    )
