"""Results of `bench_llm`, as data, text and rows for a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pumer.costs.result import GIGA, align
from pumer.lab.bench.records import environment
from pumer.lab.bench.results import Measured, cell
from pumer.lab.bench.timing import Timing

MEBI = 2**20


@dataclass(frozen=True)
class AnswerRow:
    """Measurements of one variant; None where something was not measured.

    Args:
        variant: "stock" or the reducer's name.
        prefill: seconds from the prompt to the first token of the answer.
        decode: seconds of every further token.
        whole: seconds of prefill and all further tokens.
        x_prefill, x_decode, x_whole: speed-ups over stock, of the medians.
        macs: multiply-accumulates of a prompt's prefill, with vision tower and reducer.
        flops_ratio: FLOPs of stock over these: the upper bound of `x_prefill`.
        flops_share: `x_prefill` over `flops_ratio`: how much of that is reached.
        cache_bytes: of keys and values after the prefill of the batch.
        planned_bytes: of the tokens that every layer had to keep.
        cache_share: of stock's.
        peak_bytes: peak activation memory of the batch's prefill, with the cache, without weights
            and inputs.
        memory_share: of stock's.
        tower: time of the vision tower, as a share of the prefill.
        selection: time of selecting and reducing tokens, as a share of the prefill.
        note: why something was not measured.
    """

    variant: str
    prefill: Timing | None = None
    decode: Timing | None = None
    whole: Timing | None = None
    x_prefill: float | None = None
    x_decode: float | None = None
    x_whole: float | None = None
    macs: int | None = None
    flops_ratio: float | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    planned_bytes: int | None = None
    cache_share: float | None = None
    peak_bytes: int | None = None
    memory_share: float | None = None
    tower: float | None = None
    selection: float | None = None
    note: str = ""


COLUMNS = (
    *environment(),
    "model",
    "layers",
    "tower_layers",
    "batch",
    "text",
    "new_tokens",
    "device",
    "dtype",
    "attention",
    "runs",
    "variant",
    "prefill_median_s",
    "prefill_p20_s",
    "prefill_p80_s",
    "decode_median_s",
    "decode_p20_s",
    "decode_p80_s",
    "whole_median_s",
    "whole_p20_s",
    "whole_p80_s",
    "x_prefill",
    "x_decode",
    "x_whole",
    "gmacs",
    "flops_ratio",
    "flops_share",
    "cache_bytes",
    "planned_bytes",
    "cache_share",
    "peak_bytes",
    "memory_share",
    "tower_share",
    "selection_share",
    "weight_bytes",
    "note",
)
"""Columns of `AnswerBench.records`."""


class AnswerBench(Measured[AnswerRow]):
    """Answers, see `Measured`."""

    def records(self) -> list[dict[str, Any]]:
        """One flat row per variant, for a CSV file: the same columns whatever was measured."""
        return [
            {
                **self.environment,
                **self.settings,
                "variant": row.variant,
                **_spread("prefill", row.prefill),
                **_spread("decode", row.decode),
                **_spread("whole", row.whole),
                "x_prefill": cell(row.x_prefill, ".4g"),
                "x_decode": cell(row.x_decode, ".4g"),
                "x_whole": cell(row.x_whole, ".4g"),
                "gmacs": cell(row.macs and row.macs / GIGA, ".6g"),
                "flops_ratio": cell(row.flops_ratio, ".4g"),
                "flops_share": cell(row.flops_share, ".4g"),
                "cache_bytes": cell(row.cache_bytes, "d"),
                "planned_bytes": cell(row.planned_bytes, "d"),
                "cache_share": cell(row.cache_share, ".4g"),
                "peak_bytes": cell(row.peak_bytes, "d"),
                "memory_share": cell(row.memory_share, ".4g"),
                "tower_share": cell(row.tower, ".4g"),
                "selection_share": cell(row.selection, ".4g"),
                "weight_bytes": cell(self.weight_bytes, "d"),
                "note": row.note,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        times: list[tuple[str, ...]] = [
            (
                "",
                "prefill ms",
                "p20 - p80",
                "x",
                "ratio",
                "seen",
                "tower",
                "choosing",
                "token ms",
                "x",
                "whole ms",
                "x",
            )
        ]
        costs: list[tuple[str, ...]] = [
            ("", "GFLOPs", "cache MiB", "of stock", "peak MiB", "of stock")
        ]
        weights = cell(self.weight_bytes and self.weight_bytes / MEBI, ".0f")
        return "\n".join(
            [
                *self.heading(),
                *align(times + [(row.variant, *_times(row)) for row in self.rows], left=1),
                "",
                *align(costs + [(row.variant, *_costs(row)) for row in self.rows], left=1),
                "",
                "prefill: median up to the first token, vision tower included. token: every "
                "further one. whole: all.",
                "x: against stock. ratio: stock's FLOPs over these. seen: x of the prefill as a "
                "share of that ratio.",
                "tower, choosing: shares of the prefill that go into the vision tower, and into "
                "choosing and reducing.",
                "GFLOPs: of a prompt. cache: keys and values after the prefill. peak: its "
                "activations, cache included"
                f"{f'; the weights are {weights} MiB' if weights else ''}.",
                *(f"{row.variant}: {row.note}" for row in self.rows if row.note),
            ]
        )


def _spread(name: str, timing: Timing | None) -> dict[str, str]:
    values = (None, None, None) if timing is None else (timing.median, timing.p20, timing.p80)
    return {
        f"{name}_{which}_s": cell(value, ".6g")
        for which, value in zip(("median", "p20", "p80"), values, strict=True)
    }


def _times(row: AnswerRow) -> tuple[str, ...]:
    if row.prefill is None:
        return ("not measured", *[""] * 10)
    return (
        f"{1e3 * row.prefill.median:.1f}",
        f"{1e3 * row.prefill.p20:.1f} - {1e3 * row.prefill.p80:.1f}",
        cell(row.x_prefill, ".2f"),
        cell(row.flops_ratio, ".2f"),
        cell(row.flops_share, ".2f"),
        cell(row.tower, ".1%"),
        cell(row.selection, ".1%"),
        "" if row.decode is None else f"{1e3 * row.decode.median:.1f}",
        cell(row.x_decode, ".2f"),
        "" if row.whole is None else f"{1e3 * row.whole.median:.1f}",
        cell(row.x_whole, ".2f"),
    )


def _costs(row: AnswerRow) -> tuple[str, ...]:
    return (
        cell(row.macs and 2 * row.macs / GIGA, ".2f"),
        cell(row.cache_bytes and row.cache_bytes / MEBI, ".1f"),
        cell(row.cache_share, ".0%"),
        cell(row.peak_bytes and row.peak_bytes / MEBI, ".1f"),
        cell(row.memory_share, ".0%"),
    )
