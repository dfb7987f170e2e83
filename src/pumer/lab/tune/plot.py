"""The evidence as a picture: what every judged point loses, with its interval, against how fast it
is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumer._files import replacing

_KINDS = {  # status: label, colour, marker; colours that also differ for the colour-blind
    "over": ("over the bound for certain", "#d55e00", "x"),
    "worse": ("worse than another for certain", "#d55e00", "x"),
    "hopeless": ("not to be accepted any more", "#e69f00", "v"),
    "doubtful": ("doubtful", "#999999", "o"),
    "judged": ("judged to the end", "#0072b2", "o"),
    "promising": ("promising", "#0072b2", "o"),
    "failed": ("promising, failed its check", "#cc79a7", "s"),
    "unfit": ("accepted, but slower or larger when measured", "#56b4e9", "D"),
    "found": ("found", "#009e73", "*"),
}
_PLAIN = (
    "over",
    "worse",
    "hopeless",
)  # judged on a few examples, with intervals wider than the plot


def draw(rows: Sequence[dict[str, Any]], bound: float | None, path: Path) -> None:
    """Write the plot as `path`.png and `path`.svg.

    Args:
        rows: the evidence.
        bound: points that may be lost, drawn as a line.
        path: without a suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    judged = [row for row in rows if row["examples"]]
    top = math.inf if bound is None else 5 * bound
    for status, (label, colour, marker) in _KINDS.items():
        chosen = [row for row in judged if row["status"] == status]
        if not chosen:
            continue
        speed = _column(chosen, "predicted_x")
        drop, low, high = (
            [_best_known(row, name) for row in chosen] for name in ("drop", "low", "high")
        )
        is_answer = status == "found"
        if status not in _PLAIN:
            spans = [
                [d - a for d, a in zip(drop, low, strict=True)],
                [b - d for d, b in zip(drop, high, strict=True)],
            ]
            axes.errorbar(speed, drop, spans, fmt="none", ecolor=colour, elinewidth=1, alpha=0.5)
        # What is far over the bound would flatten what is near it, and stands at the upper edge.
        drop = [min(value, 0.98 * top) for value in drop]
        axes.plot(
            speed,
            drop,
            marker,
            color=colour,
            markersize=15 if is_answer else 5,
            markeredgecolor="white" if is_answer else None,
            label=f"{label} ({len(chosen)})" if not is_answer else label,
            zorder=5 if is_answer else 3,
            linestyle="none",
        )
    not_judged = [row["predicted_x"] for row in rows if not row["examples"]]
    axes.plot(
        not_judged, [0.02] * len(not_judged), "|",
        color="#999999", alpha=0.6, transform=axes.get_xaxis_transform(),
        label=f"not judged ({len(not_judged)})",
    )  # fmt: skip
    if bound is not None:
        label = f"bound: {bound:g} point{'' if bound == 1 else 's'}"
        axes.axhline(bound, color="black", linewidth=1, linestyle="--", label=label)
        axes.set_ylim(-2 * bound, top)
    axes.axhline(0, color="black", linewidth=0.5)
    fastest = max(_column(judged, "predicted_x"), default=2.0)
    axes.set_xlim(1 - 0.03 * (fastest - 1), fastest + 0.05 * (fastest - 1))
    axes.set_xlabel("times as fast as the unreduced model, predicted")
    axes.set_ylabel("points lost against the unreduced model")
    axes.set_title(_title(rows), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for format in ("png", "svg"):
        with replacing(path.with_suffix(f".{format}"), "wb") as image:
            figure.savefig(image, format=format, dpi=150)


def _best_known(row: dict[str, Any], name: str) -> float:
    """What the check said where there was one: it had more examples, that no choice depended on."""
    return float(row[f"check_{name}"] if row["check_examples"] else row[name])


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _title(rows: Sequence[dict[str, Any]]) -> str:
    answer = next((row for row in rows if row["status"] == "found"), None)
    if answer is None:
        return f"nothing accepted of {len(rows)} settings"
    checked = (
        f"{answer['check_drop']:.2f} ({answer['check_low']:.2f} to {answer['check_high']:.2f})"
    )
    return (
        f"{answer['point']}: {answer['measured_x']:.2f}x measured,\nloses {checked} points on "
        f"{answer['check_examples']} fresh examples"
    )
