"""Results of `bench`, as data, text and rows for a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pumer.costs.result import GIGA, align
from pumer.lab.bench.records import environment
from pumer.lab.bench.timing import Timing


class _Variant(Protocol):
    @property
    def variant(self) -> str: ...


R = TypeVar("R", bound=_Variant)


@dataclass(frozen=True)
class Measured(Generic[R]):
    """The rows of a measurement with settings and environment; `str` is a table.

    Args:
        settings: of the measurement.
        environment: date, machine and versions.
        rows: one per variant.
        weight_bytes: of the model, which all variants share.
    """

    settings: dict[str, Any]
    environment: dict[str, str | int]
    rows: tuple[R, ...]
    weight_bytes: int | None = None

    def row(self, variant: str) -> R:
        """The row of a variant; raises ValueError listing the ones there are."""
        matching_row = next((row for row in self.rows if row.variant == variant), None)
        if matching_row is None:
            raise ValueError(
                f"no variant is named {variant!r}; there are "
                f"{', '.join(r.variant for r in self.rows)}"
            )
        return matching_row

    def heading(self) -> list[str]:
        """The lines above a table: settings and environment."""
        return [
            ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            ", ".join(f"{name} {value}" for name, value in self.environment.items() if value != ""),
            "",
        ]


@dataclass(frozen=True)
class Row:
    """Measurements of one variant; None where something was not measured.

    Args:
        variant: "stock", "fused", or the reducer's name.
        timing: of one forward, in seconds.
        per_second: examples per second, of the median.
        x_stock: speed-up over stock transformers.
        x_fused: speed-up over fused but unreduced: the effect of the reduction.
        macs: multiply-accumulates per example, padding included.
        flops_ratio: FLOPs of fused over these: the upper bound of the speed-up.
        flops_share: `x_fused` over `flops_ratio`: how much of that is reached.
        peak_bytes: peak activation memory of the batch, without weights and inputs.
        memory_share: of stock's peak.
        overhead: time of selecting and reducing tokens, as a share of the forward.
        note: why something was not measured, or what else to know about it.
    """

    variant: str
    timing: Timing | None = None
    per_second: float | None = None
    x_stock: float | None = None
    x_fused: float | None = None
    macs: int | None = None
    flops_ratio: float | None = None
    flops_share: float | None = None
    peak_bytes: int | None = None
    memory_share: float | None = None
    overhead: float | None = None
    note: str = ""


COLUMNS = (
    *environment(),
    "model",
    "batch",
    "image_size",
    "text",
    "real_text",
    "device",
    "dtype",
    "mode",
    "runs",
    "variant",
    "median_s",
    "p20_s",
    "p80_s",
    "examples_per_s",
    "x_stock",
    "x_fused",
    "gmacs",
    "flops_ratio",
    "flops_share",
    "peak_bytes",
    "memory_share",
    "overhead_share",
    "weight_bytes",
    "note",
)
"""Columns of `Bench.records`."""


class Bench(Measured[Row]):
    """Forwards, see `Measured`."""

    def records(self) -> list[dict[str, Any]]:
        """One flat row per variant, for a CSV file: the same columns whatever was measured."""
        return [
            {
                **self.environment,
                **self.settings,
                "variant": row.variant,
                "median_s": cell(None if row.timing is None else row.timing.median, ".6g"),
                "p20_s": cell(None if row.timing is None else row.timing.p20, ".6g"),
                "p80_s": cell(None if row.timing is None else row.timing.p80, ".6g"),
                "examples_per_s": cell(row.per_second, ".6g"),
                "x_stock": cell(row.x_stock, ".4g"),
                "x_fused": cell(row.x_fused, ".4g"),
                "gmacs": cell(row.macs and row.macs / GIGA, ".6g"),
                "flops_ratio": cell(row.flops_ratio, ".4g"),
                "flops_share": cell(row.flops_share, ".4g"),
                "peak_bytes": cell(row.peak_bytes, "d"),
                "memory_share": cell(row.memory_share, ".4g"),
                "overhead_share": cell(row.overhead, ".4g"),
                "weight_bytes": cell(self.weight_bytes, "d"),
                "note": row.note,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            (
                "",
                "ex/s",
                "ms",
                "p20 - p80",
                "x stock",
                "x fused",
                "GFLOPs",
                "ratio",
                "seen",
                "MiB",
                "of stock",
            )
        ]
        for row in self.rows:
            lines.append((row.variant, *_cells(row)))
            if row.overhead is not None and row.timing is not None:
                cost = f"{1e3 * row.overhead * row.timing.median:.1f}"
                lines.append(
                    ("  of it the reducer", "", cost, f"{row.overhead:.1%} of it", *[""] * 7)
                )
        notes = [f"{row.variant}: {row.note}" for row in self.rows if row.note]
        weights = cell(self.weight_bytes and self.weight_bytes / 2**20, ".0f")
        return "\n".join(
            [
                *self.heading(),
                *align(lines, left=1),
                "",
                "ms: median of a forward. fused: fused kernels and trimmed padding, nothing "
                "reduced.",
                "GFLOPs: per example. ratio: those of fused over these. seen: x fused as a share "
                "of that ratio.",
                "MiB: peak of a batch's "
                f"activations{f'; the weights are {weights} MiB' if weights else ''}.",
                *notes,
            ]
        )


def _cells(row: Row) -> tuple[str, ...]:
    if row.timing is None:
        return ("not measured", *[""] * 9)
    return (
        cell(row.per_second, ".2f"),
        f"{1e3 * row.timing.median:.1f}",
        f"{1e3 * row.timing.p20:.1f} - {1e3 * row.timing.p80:.1f}",
        cell(row.x_stock, ".2f"),
        cell(row.x_fused, ".2f"),
        cell(row.macs and 2 * row.macs / GIGA, ".2f"),
        cell(row.flops_ratio, ".2f"),
        cell(row.flops_share, ".2f"),
        cell(row.peak_bytes and row.peak_bytes / 2**20, ".1f"),
        cell(row.memory_share, ".0%"),
    )


def cell(value: float | int | None, form: str) -> str:
    """A number in a table, empty for None.

    >>> cell(0.5, ".0%")
    '50%'
    """
    return "" if value is None else format(value, form)
