"""Running a scoring job: in memory, or streamed to disk by one process, the ranks of torchrun, or
Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from pumer._files import check_folder, check_space, locked
from pumer.lab.data.images import ImageSource, ImageTransform
from pumer.lab.data.text import TextTransform
from pumer.lab.score.chunks import Matrix
from pumer.lab.score.job import Job, Scorer

Engine = Literal["plain", "ray"]
_LOOK = 0.2  # seconds between looks at what other ranks have finished


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

    They are those that the model's forward gives for each pair, and a active reduction acts
    likewise; arguments and errors are those of `Job`. For more than fits into memory, or into an
    afternoon, see `stream_pairs`.
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
    engine: Engine = "plain",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> np.ndarray:
    """Scores of every image with every text, chunk by chunk into a folder; float32 [images, texts],
    memory-mapped.

    Killed at any moment and called again with the same job, it goes on after the chunks that were
    finished, and the file that comes of it is the same. Under torchrun the ranks take chunks in
    turn and none waits for another until all is done; the folder is one that they all see. Every
    rank gets the result.

    Args:
        job: what to score.
        out: a folder that is new, or holds this job's scores.
        engine: "ray" computes on the workers of a Ray cluster; the folder is the caller's alone.
        workers: of Ray, each with a model of its own; its GPUs, or 2, if not given.
        address: of the Ray cluster; one is started on this machine if not given.
        progress: show a bar.
        say: told how much there was already.

    Raises:
        ValueError: as `Job.check`; if the folder holds scores of something else, or other files;
            without Ray where it is asked for.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if engine == "ray" and ranks > 1:
        raise ValueError("Ray distributes the work itself: start the command without torchrun")
    check_folder(out)
    check_space(out, 2 * 4 * job.chunks.images * job.chunks.texts)  # chunks, and the whole
    fingerprint = job.fingerprint()
    # Ranks share a folder, of which the first one keeps other commands out.
    with locked(Path(out), wait=0.0) if rank == 0 else nullcontext():
        return _stream(
            job,
            Matrix(out, job.chunks, fingerprint),
            rank,
            ranks,
            engine,
            workers,
            address,
            progress,
            say,
        )


def _stream(
    job: Job,
    matrix: Matrix,
    rank: int,
    ranks: int,
    engine: Engine,
    workers: int | None,
    address: str | None,
    progress: bool,
    say: Callable[[str], None],
) -> np.ndarray:
    chunks, missing = matrix.chunks, matrix.missing()
    if matrix.damaged and rank == 0:
        say(f"{matrix.file} is not as it was written, and is computed again")
    if len(missing) < len(chunks) and rank == 0:
        say(f"{len(chunks) - len(missing)} of {len(chunks)} chunks are in {matrix.folder} already")
    # By number and not by place among the missing ones: a rank that starts later sees fewer of
    # them.
    mine = [chunk_index for chunk_index in missing if chunk_index % ranks == rank]
    total = sum(rows * columns for rows, columns in map(chunks.shape, mine))
    with _bar(total, progress and rank == 0 and bool(mine)) as advance:
        for chunk_index, scores in _computed(job, mine, engine, workers, address, advance):
            matrix.write(chunk_index, scores)
    while rank == 0 and matrix.missing():
        time.sleep(_LOOK)
    if rank == 0:
        matrix.assemble()
    while not matrix.complete:
        time.sleep(_LOOK)
    return matrix.open()


def _computed(
    job: Job,
    numbers: Sequence[int],
    engine: Engine,
    workers: int | None,
    address: str | None,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Tensor]]:
    """Chunks as they are finished."""
    scorer = Scorer(job)
    if engine == "plain":
        yield from ((chunk_index, scorer(chunk_index, advance)) for chunk_index in numbers)
        return
    from pumer.lab.score.ray import spread

    for chunk_index, scores in spread(scorer, numbers, workers, address):
        advance(scores.numel())
        yield chunk_index, scores


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f} pairs/s")


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("scoring {task.completed:,.0f} of {task.total:,.0f} pairs"),
        BarColumn(),
        _Rate(),
    )
    # A chunk may take minutes: the rate is that of a longer stretch than the usual half minute.
    with Progress(
        *columns, TimeRemainingColumn(), disable=not shown, speed_estimate_period=600
    ) as progress:
        bar = progress.add_task("", total=total)
        yield lambda pairs: progress.advance(bar, pairs)
