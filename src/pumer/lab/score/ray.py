"""Distribute work over a Ray cluster with Ray Data; the only file that imports ray."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pumer._extras import need
from pumer.lab.evaluate import Result, predict
from pumer.lab.tasks.base import Collator, Example

Engine = Literal["plain", "ray"]
"""Where work is done: in this process, or on the workers of a Ray cluster."""


@dataclass(frozen=True)
class Cluster:
    """Ray's workers.

    Args:
        workers: number of workers, each with its own copy of the model; the cluster's GPUs, or 2,
            if not given.
        address: of the cluster; one is started on this machine if not given.
    """

    workers: int | None = None
    address: str | None = None


def spread(work: Any, numbers: Sequence[int], cluster: Cluster) -> Iterator[tuple[int, Any]]:
    """Yield `(number, work(number))` for every number, in order of completion.

    Each worker gets one copy of `work`, and moves its `model` to its GPU if it has one. Files that
    the work reads must have the same path on every machine. A worker that dies is replaced and its
    number computed again.

    Args:
        work: callable with a number, with an attribute `model`; it can be pickled.
        numbers: items of work.
        cluster: its workers; without an address a cluster is started on this machine and stopped
            again, unless one is running.

    Raises:
        ValueError: without ray, and for less than one worker.
    """
    workers = cluster.workers
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1")
    if not numbers:
        return
    ray = _import()
    with _joined(ray, cluster):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        items = ray.data.from_items(
            [{"number": chunk_index} for chunk_index in numbers], override_num_blocks=len(numbers)
        )
        done = items.map_batches(
            _Worker,
            fn_constructor_args=([ray.put(work)],),  # inside a list a reference is not resolved
            compute=ray.data.ActorPoolStrategy(size=min(workers or gpus or 2, len(numbers))),
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in done.iter_rows():
            yield row["number"], pickle.loads(row["result"])


@dataclass(frozen=True, eq=False)
class _Batches:
    """Predicts a batch of examples, by its number."""

    model: Any
    examples: Sequence[Example]
    collator: Collator
    batch_size: int

    def __call__(self, number: int) -> Result:
        start = number * self.batch_size
        batch = [
            self.examples[n] for n in range(start, min(start + self.batch_size, len(self.examples)))
        ]
        return predict(
            self.model, batch, self.collator, batch_size=self.batch_size, skip_broken=True
        )


def predict_on_ray(
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    cluster: Cluster,
    *,
    batch_size: int = 32,
) -> Result:
    """`evaluate.predict` on a cluster, skipping broken images; see `spread`."""
    work = _Batches(model, examples, collator, batch_size)
    numbers = range(-(-len(examples) // batch_size))
    results = [
        result for _, result in sorted(spread(work, numbers, cluster), key=lambda pair: pair[0])
    ]
    return Result(
        predictions={key: value for result in results for key, value in result.predictions.items()},
        metric={},
        seconds=sum(result.seconds for result in results),
        examples=sum(result.examples for result in results),
        broken={key: reason for result in results for key, reason in result.broken.items()},
    )


class _Worker:
    """A process of the cluster."""

    def __init__(self, reference: list[Any]) -> None:
        import ray

        self.work: Callable[[int], Any] = ray.get(reference[0])
        if torch.cuda.is_available():
            self.work.model.to("cuda")  # type: ignore[attr-defined]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        numbers = batch["number"]
        return {
            "number": numbers,
            "result": [pickle.dumps(self.work(int(chunk_index))) for chunk_index in numbers],
        }


def _import() -> Any:
    need("the engine ray", "ray", "ray")
    import ray
    import ray.data

    return ray


@contextmanager
def _joined(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Join a cluster, or start one; uses one that is already running in this process."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One processor more than workers, for Ray Data itself.
    local: dict[str, Any] = {"num_cpus": (cluster.workers or 2) + 1, "include_dashboard": False}
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="warning",
        **({} if cluster.address else local),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
