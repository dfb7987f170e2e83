"""Progress bars over a study's points, and durations in words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

from pumer._terminal import visible
from pumer.lab.study.points import Point


def tracked(points: Sequence[Point], seconds: dict[str, float]) -> Iterator[Point]:
    """Iterate over points with a progress bar and an estimate of the remaining time."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}{task.fields[left]}", markup=False),
    )
    start, expected = time.perf_counter(), 0.0
    with progress_bars(*columns) as progress:
        bar = progress.add_task("", total=len(points), left="")
        for index, point in enumerate(points):
            # Correct the estimate by how far it has been off so far.
            ratio = (time.perf_counter() - start) / expected if expected else 1.0
            seconds_left = ratio * sum(seconds[other.id] for other in points[index:])
            progress.update(
                bar, description=visible(str(point)), left=f", about {in_words(seconds_left)} left"
            )
            yield point
            expected += seconds[point.id]
            progress.advance(bar)


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Transient progress bars, disabled outside of terminals."""
    return Progress(*columns, transient=True, disable=not Console().is_terminal)


def in_words(seconds: float) -> str:
    """A duration in words.

    >>> in_words(42.0), in_words(600.0), in_words(7500.0)
    ('42 s', '10 min', '2 h 5 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
