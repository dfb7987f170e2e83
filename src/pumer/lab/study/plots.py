"""Accuracy against speed, FLOPs and memory, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumer._files import replacing
from pumer.lab.study.curves import Setting, Spreads, half_width, pareto, seed_spreads
from pumer.lab.study.points import BASELINE

# Okabe and Ito's colours, which the colour-blind can tell apart; black is for the unreduced model.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C564B")
_MARKERS = "osD^vPXh"
_LEGEND_ROWS = 16
Place = tuple[float, Setting]
"""A setting and where it lies across the plot."""


@dataclass(frozen=True)
class Axis:
    """What accuracy is drawn against.

    Args:
        name: in the file's name.
        title: at the axis.
        value: of a setting, None if it was not measured.
        more_is_better: whether a method wants to be on the right.
    """

    name: str
    title: str
    value: Callable[[Setting], float | None]
    more_is_better: bool


AXES = (
    Axis("throughput", "speed, times unreduced (measured)", lambda setting: setting.speed_up, True),
    Axis("flops", "GFLOPs per example", lambda setting: setting.mean("gflops"), False),
    Axis(
        "memory",
        "peak activations of a batch, MiB",
        lambda setting: setting.mean("peak_bytes") / 2**20,
        False,
    ),
)


def plot(settings: Sequence[Setting], folder: Path, name: str) -> list[Path]:
    """Draw a study's plots; returns the PNG files, next to which lie the SVG ones.

    What was not measured of any setting is not drawn.

    Faint dots are single seeds, lines go through the means over the seeds, bands are 95 %
    intervals, rings mark the Pareto front of all settings, and the star is the unreduced model.
    """
    import matplotlib
    from matplotlib.figure import Figure

    files = []
    # The same file for the same rows, with text as text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        spreads = seed_spreads(settings)
        for axis in AXES:
            measured = [
                (value, setting)
                for setting in settings
                if (value := axis.value(setting)) is not None
            ]
            if not measured:
                continue
            # So that the legend, of methods, the unreduced model and the front, is no higher than
            # the plot.
            columns = -(-(len({setting.method for _, setting in measured}) + 1) // _LEGEND_ROWS)
            figure = Figure(
                figsize=(6.0 + 2.2 * columns, 4.8 + 0.6 * (columns > 1)), layout="constrained"
            )
            _draw(figure.add_subplot(), measured, axis, spreads, name, columns)
            file = folder / f"{name}-{axis.name}.png"
            with replacing(file, "wb") as image:
                figure.savefig(image, format="png", dpi=150)
            with replacing(file.with_suffix(".svg"), "wb") as image:
                figure.savefig(image, format="svg", metadata={"Date": None})
            files.append(file)
    return files


def _draw(
    axes: Any, measured: Sequence[Place], axis: Axis, spreads: Spreads, name: str, columns: int
) -> None:
    methods = dict.fromkeys(setting.method for _, setting in measured if setting.method != BASELINE)
    for method_index, method in enumerate(methods):
        again = method_index // len(
            _COLOURS
        )  # how often each colour has been used: then the marker and the line tell
        style = {
            "color": _COLOURS[method_index % len(_COLOURS)],
            "marker": _MARKERS[(method_index + again) % len(_MARKERS)],
            "linestyle": ("-", "--", "-.", ":")[again % 4],
            "markersize": 5,
            "linewidth": 1.5,
        }
        curve = sorted(
            (pair for pair in measured if pair[1].method == method), key=lambda pair: pair[0]
        )
        _line(axes, curve, spreads, style)
    base = [pair for pair in measured if pair[1].method == BASELINE]
    for pair in base:
        axes.axhline(pair[1].accuracy, color="black", linewidth=0.8, linestyle=":", zorder=0)
        _line(
            axes,
            [pair],
            spreads,
            {"color": "black", "marker": "*", "markersize": 13, "linestyle": "", "zorder": 5},
        )
    sign = -1 if axis.more_is_better else 1
    places = [(value, setting.accuracy) for value, setting in measured]
    front = [places[index] for index in pareto([(sign * x, y) for x, y in places])]
    axes.plot(
        *zip(*front, strict=True),
        linestyle="",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=0.9,
        label="Pareto front",
        zorder=6,
    )
    axes.set_xlabel(
        f"{axis.title}   better →" if axis.more_is_better else f"← better   {axis.title}"
    )
    axes.set_ylabel("accuracy, %")
    axes.set_title(name, loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the plot, where it hides no point.
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, ncols=columns)


def _line(axes: Any, curve: Sequence[Place], spreads: Spreads, style: dict[str, Any]) -> None:
    """One method: its settings with their intervals, and the single seeds where there are
    several."""
    x = [value for value, _ in curve]
    y = [setting.accuracy for _, setting in curve]
    margin = [half_width(setting, spreads) for _, setting in curve]
    if len(curve) > 1:
        low, high = ([v + sign * m for v, m in zip(y, margin, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=margin, color=style["color"], capsize=3, linewidth=1)
    axes.plot(x, y, label=curve[0][1].method, **style)
    dots = [
        (v, row["accuracy"])
        for v, setting in curve
        if len(setting.rows) > 1
        for row in setting.rows
    ]
    if dots:
        axes.scatter(
            *zip(*dots, strict=True), s=10, color=style["color"], alpha=0.35, linewidths=0, zorder=1
        )
