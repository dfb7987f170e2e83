"""Run a scoring job: in memory, or streamed to disk by one process, the ranks of torchrun, or
Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch import Tensor

from pumer._files import check_folder, check_space, locked
from pumer.lab.data.images import ImageSource, ImageTransform
from pumer.lab.data.text import TextTransform
from pumer.lab.progress import Log, Progress, no_log
from pumer.lab.score.chunks import Matrix
from pumer.lab.score.job import Job, Scorer
from pumer.lab.score.ray import Cluster, spread

_LOOK = 0.2  # seconds between checks of what other ranks have finished


def score_pairs(
    model: Any,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    tokenize: TextTransform,
    transform: ImageTransform,
    *,
    batch_size: int = 64,
) -> Tensor:
    """Scores of every image with every text, float32 [images, texts] on the CPU.

    They equal those of the model's forward for each pair, with its active reducer. Arguments and
    errors are those of `Job`. For pools that exceed memory use `stream_pairs`.
    """
    job = Job(model, images, texts, tokenize, transform, batch_size)
    job.check()
    scores, scorer = torch.empty(len(images), len(texts)), Scorer(job)
    for chunk_index in range(len(job.chunks)):
        scores[job.chunks[chunk_index]] = scorer(chunk_index)
    return scores


def stream_pairs(
    job: Job,
    out: str | Path,
    *,
    cluster: Cluster | None = None,
    show_progress: bool = False,
    log: Log = no_log,
) -> np.ndarray:
    """Scores of every image with every text, chunk by chunk into a folder; float32 [images, texts],
    memory-mapped.

    Resumable: called again with the same job after a kill, it continues after the finished chunks,
    and the final file is the same. Under torchrun the ranks take chunks in turn without waiting for
    each other until the end; they must share the folder. Every rank gets the result.

    Args:
        job: what to score.
        out: a folder that is new, or holds this job's scores.
        cluster: compute on the workers of a Ray cluster; only this process writes the folder.
        show_progress: show a bar.
        log: called with what was found in the folder.

    Raises:
        ValueError: as `Job.check`; if the folder holds other scores or files; without Ray where a
            cluster is given.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cluster is not None and ranks > 1:
        raise ValueError("Ray distributes the work itself: start the command without torchrun")
    check_folder(out)
    check_space(out, 2 * 4 * job.chunks.images * job.chunks.texts)  # chunks and the assembled file
    fingerprint = job.fingerprint()
    # Ranks share the folder, which rank 0 locks against other commands.
    with locked(Path(out), wait=0.0) if rank == 0 else nullcontext():
        matrix = Matrix(out, job.chunks, fingerprint)
        chunks, missing = matrix.chunks, matrix.missing()
        if matrix.damaged and rank == 0:
            log(f"{matrix.file} has changed since it was written, and is computed again")
        if len(missing) < len(chunks) and rank == 0:
            finished = len(chunks) - len(missing)
            log(f"{finished} of {len(chunks)} chunks are in {matrix.folder} already")
        # By index and not by position among the missing ones: a rank that starts later sees fewer
        # of them.
        own_chunks = [index for index in missing if index % ranks == rank]
        total = sum(rows * columns for rows, columns in map(chunks.shape, own_chunks))
        with _bar(total, show_progress and rank == 0 and bool(own_chunks)) as progress:
            for chunk_index, scores in _computed(job, own_chunks, cluster, progress):
                matrix.write(chunk_index, scores)
        return _assembled(matrix, rank)


def _assembled(matrix: Matrix, rank: int) -> np.ndarray:
    """The complete matrix, which rank 0 assembles once all chunks are finished."""
    while rank == 0 and matrix.missing():
        time.sleep(_LOOK)
    if rank == 0:
        matrix.assemble()
    while not matrix.complete:
        time.sleep(_LOOK)
    return matrix.open()


def _computed(
    job: Job, chunk_indices: Sequence[int], cluster: Cluster | None, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Chunks in order of completion."""
    scorer = Scorer(job)
    if cluster is None:
        yield from ((index, scorer(index, progress)) for index in chunk_indices)
        return
    for index, scores in spread(scorer, chunk_indices, cluster):
        progress(scores.numel())
        yield index, scores


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f} pairs/s")


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Progress]:
    """A bar of the pairs scored so far."""
    columns = (
        TextColumn("scoring {task.completed:,.0f} of {task.total:,.0f} pairs"),
        BarColumn(),
        _Rate(),
    )
    # A chunk may take minutes, so average the rate over more than the default half minute.
    with Bar(*columns, TimeRemainingColumn(), disable=not shown, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        yield lambda pairs: bar.advance(task, pairs)
