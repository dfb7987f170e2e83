"""`pumer score` and `pumer bench pairs`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from pumer._extras import need
from pumer._options import Count, OutputFile, OutputFolder
from pumer._rows import RowFile
from pumer._terminal import console
from pumer.lab.bench.settings import ReducerSettings
from pumer.lab.commands.common import open_model, open_task, print_metrics
from pumer.lab.data.images import BrokenImageError
from pumer.lab.score import Job, stream_pairs
from pumer.lab.score.bench import COLUMNS, PairsBenchSettings, bench_pairs
from pumer.lab.score.ray import Cluster, Engine
from pumer.lab.tasks import get
from pumer.lab.tasks.retrieval import Pool, check_folds, recalls, recalls_in_folds


def score_(
    model: str,
    task: str | dict[str, Any],
    out: OutputFolder,
    split: str = "test",
    reducer: ReducerSettings = None,
    chunk_images: Count = 32,
    chunk_texts: Count = 512,
    batch_size: Count = 64,
    limit: Count | None = None,
    folds: Count = 1,
    engine: Engine = "plain",
    workers: Count | None = None,
    address: str | None = None,
) -> None:
    """Score every image of a retrieval task with every caption, and report recall.

    Resumable: stopped and started again with the same options, it continues. Under torchrun the
    devices of this machine share the work.

    Args:
        model: folder of a saved model, or a shipped one's name.
        task: a task's name (`pumer list`); its settings are given as --task.root DIR.
        out: folder for the scores: `scores.npy`, float32 [images, captions], once complete.
        split: split of the task's data.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings are given as --reducer.SETTING VALUE; the model's own if not given.
        chunk_images: images per chunk; unfinished chunks are lost when the command is stopped.
        chunk_texts: captions per chunk.
        batch_size: captions per image at a time.
        limit: only the first so many images, and their captions.
        folds: divide the images into so many folds, rank within each, and report the mean: 5 for
            COCO 1K.
        engine: "ray" distributes the work over a Ray cluster.
        workers: Ray workers; the cluster's GPUs, or 2, if not given.
        address: address of a Ray cluster; one is started on this machine if not given.
    """
    name = task if isinstance(task, str) else str(task.get("name"))
    if not hasattr(get(name), "pool"):
        raise ValueError(
            f"the task {name} is not one of retrieval: it has no pool of captions to score"
        )
    if engine == "ray":
        need("the engine ray", "ray", "ray")
    net = open_model(model, reducer)
    if engine == "plain" and torch.cuda.is_available():
        net.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    collator = open_task(model, net, task)
    retrieval: Any = collator.task
    pool = _head(retrieval.pool(split), limit)
    check_folds(len(pool.images), folds)
    job = Job(
        net,
        pool.images,
        pool.captions,
        collator.text,
        collator.image,
        batch_size,
        chunk_images,
        chunk_texts,
    )
    screen = console()
    try:
        scores = stream_pairs(
            job,
            out,
            cluster=Cluster(workers, address) if engine == "ray" else None,
            show_progress=True,
            log=screen.print,
        )
    except BrokenImageError as error:
        raise ValueError(f"{error} Images count from 0 in the order of {split}.") from error
    if os.environ.get("RANK", "0") != "0":
        return
    print_metrics(
        f"{model} on {collator.task.name} {split}: {len(pool.images)} x {len(pool.captions)} pairs"
        + (f", mean of {folds} folds" if folds > 1 else ""),
        recalls_in_folds(scores, pool.image_of, folds)
        if folds > 1
        else recalls(scores, pool.image_of),
    )


def bench_pairs_(settings: PairsBenchSettings, record: OutputFile | None = None) -> None:
    """Time scoring of a pool, towers once, against the plain loop over its pairs, with and without
    reducers.

    Args:
        settings: what to measure, and how often.
        record: CSV file to add the rows to.
    """
    lines = RowFile(record, COLUMNS)
    pool = f"{settings.images} images x {settings.texts} texts"
    table = Table(title=f"{settings.model}: {pool}, batches of {settings.batch_size}")
    for column in ("reducer", "", "pairs/s", "x plain", "x plain, unreduced", "largest difference"):
        table.add_column(column, justify="right" if column else "left")
    measured = bench_pairs(settings)
    for row in measured:
        times = (f"{row[column]:.2f}" for column in ("pairs_per_second", "x_plain", "x_unreduced"))
        name = json.loads(row["reducer"])["reducer"] if row["reducer"] else "none"
        table.add_row(name, row["way"], *times, f"{row['difference']:.1e}")
    console().print(table)
    lines.append(measured)


def _head(pool: Pool, limit: Count | None) -> Pool:
    """The first images of a pool and their captions."""
    if limit is None or limit >= len(pool.images):
        return pool
    if limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1")
    captions = (pool.image_of < limit).nonzero()[0].tolist()
    return replace(
        pool,
        images=pool.images[:limit],
        image_ids=pool.image_ids[:limit],
        captions=[pool.captions[caption] for caption in captions],
        caption_ids=[pool.caption_ids[caption] for caption in captions],
        image_of=pool.image_of[captions],
    )
