"""Where token reduction pays: batch size against picture size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pumer.costs.result import align
from pumer.lab.bench.models import default_reducers
from pumer.lab.bench.results import Bench
from pumer.lab.bench.run import FUSED, Device, Dtype, ReducerSpec, bench


@dataclass(frozen=True)
class Where:
    """Measurements over a range of batch and picture sizes; `str` is a table of them.

    Args:
        benches: one measurement per cell, batch by batch.
    """

    benches: tuple[Bench, ...]

    def records(self) -> list[dict[str, Any]]:
        """One flat row per variant and measurement, with the columns of `Bench.records`."""
        return [row for measurement in self.benches for row in measurement.records()]

    def cells(self) -> list[dict[str, Any]]:
        """Per measurement: batch, image_size, x_stock, x_fused, flops_ratio, and whether it pays.

        It pays where the slower end of the reduced runs (80th percentile) is quicker than the
        quicker end of the fused ones (20th). None where nothing was measured.
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


def where(
    model: str = "vilt-b32",
    reducer: ReducerSpec | None = None,
    batches: Sequence[int] = (1, 4, 16),
    image_sizes: Sequence[int] = (192, 384, 576),
    text: int = 40,
    real_text: tuple[int, int] = (8, 16),
    device: Device = "auto",
    dtype: Dtype = "float32",
    compiled: bool = False,
    threads: int | None = None,
    runs: int = 5,
    warmup: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Where:
    """Measure one reducer at every batch size and every picture size, against stock and against
    fused.

    Args:
        model: a name in `bench.models.CONFIGS`.
        reducer: a preset, a reducer's name, `{"reducer": name, setting: value}`, or a reducer; the
            model's first preset for VQAv2 if not given.
        batches: numbers of examples at a time.
        image_sizes: sides of the square pictures in pixels.
        text: text tokens, padding included.
        real_text: fewest and most real text tokens of an example.
        device: "auto" takes a CUDA device if there is one.
        dtype: of weights and activations.
        compiled: measure under torch.compile.
        threads: CPU threads; torch's own choice if not given.
        runs: timed forwards of each variant.
        warmup: forwards before those.
        progress: called after every measurement.

    Raises:
        ValueError: for unknown names and settings that do not fit.
    """
    if not batches or not image_sizes:
        raise ValueError("give at least one batch size and one picture size")
    if reducer is None:
        reducer = default_reducers(model)[0]
    benches = []
    for batch in batches:
        for size in image_sizes:
            benches.append(
                bench(
                    model,
                    [reducer],
                    batch,
                    size,
                    text,
                    real_text,
                    device,
                    dtype,
                    compiled,
                    threads,
                    runs,
                    warmup,
                    memory=False,
                    overhead=False,
                )
            )
            progress()
    return Where(tuple(benches))


def _cell(cell: dict[str, Any]) -> str:
    if cell["x_fused"] is None:
        return "not measured"
    return f"{'' if cell['pays'] else '- '}{cell['x_fused']:.2f} ({cell['x_stock']:.2f})"
