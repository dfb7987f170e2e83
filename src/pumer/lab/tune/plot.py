"""The evidence of a tuning as a plot: what every judged point loses, with its interval, against its
speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumer._files import replacing

_BLUE, _GREEN, _GREY, _LABEL_GREY = "#0072b2", "#009e73", "#c4c8ce", "#8a9098"
_REJECTED = {  # status: what the legend calls it, and its marker; all of them grey
    "over": ("over the bound", "x"),
    "worse": ("worse than another", "x"),
    "hopeless": ("given up", "v"),
    "doubtful": ("doubtful", "o"),
    "failed": ("failed its check", "s"),
    "unfit": ("slower or larger when measured", "D"),
}
_OPEN = ("judged", "promising")  # what may still be accepted
_FEW_EXAMPLES = ("over", "worse", "hopeless")  # whose intervals are wider than the plot


def plot(rows: Sequence[dict[str, Any]], bound: float | None, path: Path) -> None:
    """Write the plot as `path`.png and `path`.svg.

    The accepted point and those that could have been are coloured, the first is labelled with its
    settings; all others are grey.

    Args:
        rows: the evidence.
        bound: points that may be lost, drawn as a line.
        path: without a suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    judged = [row for row in rows if row["examples"]]
    top = math.inf if bound is None else 5 * bound
    for status, (label, marker) in _REJECTED.items():
        chosen = [row for row in judged if row["status"] == status]
        _points(axes, chosen, _GREY, marker, top, f"{label} ({len(chosen)})")
    candidates = [row for row in judged if row["status"] in _OPEN]
    _points(axes, candidates, _BLUE, "o", top, f"candidates ({len(candidates)})")
    answers = [row for row in judged if row["status"] == "found"]
    _points(axes, answers, _GREEN, "*", top, "", size=15)
    for row in answers:
        star = (float(row["predicted_x"]), _best_known(row, "drop"))
        axes.annotate(
            row["point"], star, (10, 8), textcoords="offset points", color=_GREEN, weight="bold"
        )
    not_judged = [row["predicted_x"] for row in rows if not row["examples"]]
    axes.plot(
        not_judged, [0.02] * len(not_judged), "|",
        color=_GREY, alpha=0.8, transform=axes.get_xaxis_transform(),
        label=f"not judged ({len(not_judged)})",
    )  # fmt: skip
    fastest = max((float(row["predicted_x"]) for row in judged), default=2.0)
    axes.set_xlim(1 - 0.03 * (fastest - 1), fastest + 0.05 * (fastest - 1))
    if bound is not None:
        axes.axhline(bound, color="black", linewidth=1, linestyle="--")
        label = f"bound: {bound:g} point{'' if bound == 1 else 's'}"
        axes.annotate(
            label, (1, bound), (-4, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
        axes.set_ylim(-2 * bound, top)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel("speed, times unreduced (predicted)   better →")
    axes.set_ylabel("← better   points lost")
    axes.set_title(_title(rows), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.legend(
        loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=_LABEL_GREY
    )
    for format in ("png", "svg"):
        with replacing(path.with_suffix(f".{format}"), "wb") as image:
            figure.savefig(image, format=format, dpi=150)


def _points(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    colour: str,
    marker: str,
    top: float,
    label: str,
    size: float = 5,
) -> None:
    """Points of one status, with their intervals where these fit into the plot."""
    if not rows:
        return
    speed = [float(row["predicted_x"]) for row in rows]
    drop, low, high = ([_best_known(row, name) for row in rows] for name in ("drop", "low", "high"))
    if rows[0]["status"] not in _FEW_EXAMPLES:
        spans = [
            [d - a for d, a in zip(drop, low, strict=True)],
            [b - d for d, b in zip(drop, high, strict=True)],
        ]
        axes.errorbar(speed, drop, spans, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
    # What is far over the bound would flatten what is near it, and stands at the upper edge.
    drop = [min(value, 0.98 * top) for value in drop]
    axes.plot(
        speed, drop, marker, color=colour, markersize=size, label=label or None, linestyle="none",
        zorder=3 if colour == _GREY else 5,
    )  # fmt: skip


def _best_known(row: dict[str, Any], name: str) -> float:
    """From the check if there was one: it had more examples, on which no choice depended."""
    return float(row[f"check_{name}"] if row["check_examples"] else row[name])


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
