"""Where token reduction pays: batch size by image size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pumer.costs.result import align
from pumer.lab.bench.models import default_reducers
from pumer.lab.bench.results import Bench
from pumer.lab.bench.run import FUSED, bench
from pumer.lab.bench.settings import BenchSettings, SweepSettings
from pumer.lab.progress import Progress, no_progress


@dataclass(frozen=True)
class Sweep:
    """Measurements over batch and image sizes; `str` is a table of them.

    Args:
        benches: one measurement per cell, batch by batch.
    """

    benches: tuple[Bench, ...]

    def records(self) -> list[dict[str, Any]]:
        """One flat row per variant and measurement, with the columns of `Bench.records`."""
        return [row for measurement in self.benches for row in measurement.records()]

    def cells(self) -> list[dict[str, Any]]:
        """Per measurement: batch, image_size, x_stock, x_fused, flops_ratio, and whether it pays.

        It pays if the 80th percentile of the reduced runs is faster than the 20th of the fused
        ones. None if nothing was measured.
        """
        cells = []
        for measurement in self.benches:
            fused, reduced = measurement.row(FUSED).timing, measurement.rows[-1]
            cells.append(
                {
                    "batch": measurement.settings["batch"],
                    "image_size": measurement.settings["image_size"],
                    "x_stock": reduced.x_stock,
                    "x_fused": reduced.x_fused,
                    "flops_ratio": reduced.flops_ratio,
                    "pays": None
                    if fused is None or reduced.timing is None
                    else reduced.timing.p80 < fused.p20,
                }
            )
        return cells

    def __str__(self) -> str:
        cells = self.cells()
        sizes = sorted({cell["image_size"] for cell in cells})
        rows: list[tuple[str, ...]] = [("batch", *(f"{size} px" for size in sizes))]
        for batch in sorted({cell["batch"] for cell in cells}):
            by_size = {cell["image_size"]: cell for cell in cells if cell["batch"] == batch}
            rows.append((str(batch), *(_cell(by_size[size]) for size in sizes)))
        first = self.benches[0]
        shown = {
            name: value
            for name, value in first.settings.items()
            if name not in ("batch", "image_size")
        }
        return "\n".join(
            [
                f"{first.rows[-1].variant}: "
                + ", ".join(f"{name} {value}" for name, value in shown.items()),
                ", ".join(
                    f"{name} {value}" for name, value in first.environment.items() if value != ""
                ),
                "",
                *align(rows),
                "",
                "x fused (x stock); a - marks where the runs overlap with the unreduced ones: it "
                "does not pay there.",
                *dict.fromkeys(
                    f"{row.variant}: {row.note}"
                    for measurement in self.benches
                    for row in measurement.rows
                    if row.note
                ),
            ]
        )


def sweep(settings: SweepSettings, *, warmup: int = 1, progress: Progress = no_progress) -> Sweep:
    """Measure one reducer at every batch size and image size, against stock and fused.

    Args:
        settings: what to measure, where, and how often.
        warmup: untimed forwards of each variant.
        progress: called with 1 after every measurement.

    Raises:
        ValueError: for unknown names and settings that do not fit.
    """
    batches = [1, 4, 16] if settings.batches is None else settings.batches
    image_sizes = [192, 384, 576] if settings.image_sizes is None else settings.image_sizes
    if not batches or not image_sizes:
        raise ValueError("give at least one batch size and one image size")
    base = BenchSettings(
        model=settings.model,
        reducers=[settings.reducer or default_reducers(settings.model)[0]],
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        runs=settings.runs,
    )
    benches = []
    for batch in batches:
        for size in image_sizes:
            cell = replace(base, batch=batch, image_size=size)
            benches.append(bench(cell, warmup=warmup, memory=False, overhead=False))
            progress(1)
    return Sweep(tuple(benches))


def _cell(cell: dict[str, Any]) -> str:
    if cell["x_fused"] is None:
        return "not measured"
    return f"{'' if cell['pays'] else '- '}{cell['x_fused']:.2f} ({cell['x_stock']:.2f})"
