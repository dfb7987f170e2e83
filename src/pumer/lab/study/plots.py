"""Accuracy against speed, FLOPs and memory, as PNG and SVG.

A study may have twenty methods. What matters is which of them nothing beats, and where PuMer is:
these have a colour and their name at the line, all others are grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pumer._files import replacing
from pumer.lab.study.curves import Setting, Spreads, half_width, pareto, seed_spreads
from pumer.lab.study.points import BASELINE

FLAGSHIP = "PuMer"
"""The method that is always labelled."""
# Okabe and Ito's colours, distinct for the colour-blind, then more for long fronts; black is the
# unreduced model's.
_COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
    "#5D3A9B", "#8C564B", "#7A9A01", "#B3003C", "#00838F", "#6B6B00",
)  # fmt: skip
_MARKERS = "osD^vPXh"
_GREY, _LABEL_GREY = "#C4C8CE", "#8A9098"
_SAME = 0.01  # relative difference below which two values are one
_Located = tuple[float, Setting]
"""A value on the horizontal axis, and the setting it belongs to."""


@dataclass(frozen=True)
class PlotAxis:
    """What accuracy is plotted against.

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
    PlotAxis("throughput", "speed, times unreduced (measured)", lambda s: s.speed_up, True),
    PlotAxis("flops", "GFLOPs per example", lambda s: s.mean("gflops"), False),
    PlotAxis(
        "memory",
        "peak activations of a batch, MiB",
        lambda setting: setting.mean("peak_bytes") / 2**20,
        False,
    ),
)


def plot(settings: Sequence[Setting], folder: Path, name: str) -> list[Path]:
    """Plot a study; returns the PNG files, next to which lie the SVG ones.

    Lines go through the means over the seeds. Methods on the Pareto front and PuMer are coloured
    and labelled, with 95 % intervals and, as faint dots, the single seeds; all others are grey.
    The star is the unreduced model. A plot is left out, and an old one deleted, where nothing was
    measured or where most methods have the unreduced model's value.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    located = {axis.name: _located(settings, axis) for axis in AXES}
    drawn = [axis for axis in AXES if located[axis.name] and separates(located[axis.name])]
    styles = _styles(settings, [front_of(located[a.name], a.more_is_better) for a in drawn])
    spreads = seed_spreads(settings)
    files = []
    # The same file for the same rows, with text as text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        for axis in AXES:
            file = folder / f"{name}-{axis.name}.png"
            if axis not in drawn:
                for stale in (file, file.with_suffix(".svg")):
                    stale.unlink(missing_ok=True)
                continue
            figure = Figure(figsize=(7.2, 4.8), layout="constrained")
            FigureCanvasAgg(figure)  # labels are placed by their extents
            _draw(figure, located[axis.name], axis, spreads, styles, name)
            with replacing(file, "wb") as image:
                figure.savefig(image, format="png", dpi=150)
            with replacing(file.with_suffix(".svg"), "wb") as image:
                figure.savefig(image, format="svg", metadata={"Date": None})
            files.append(file)
    return files


def _located(settings: Sequence[Setting], axis: PlotAxis) -> list[_Located]:
    values = [(axis.value(setting), setting) for setting in settings]
    return [(value, setting) for value, setting in values if value is not None]


def _styles(
    settings: Sequence[Setting], fronts: Sequence[Sequence[_Located]]
) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method that stands out in some plot: the same in all of them."""
    on_front = {setting.method for front in fronts for _, setting in front} | {FLAGSHIP}
    order = dict.fromkeys(setting.method for setting in settings if setting.method != BASELINE)
    main = sorted(
        (method for method in order if method in on_front), key=lambda method: method != FLAGSHIP
    )
    # Where colours repeat, markers do not.
    return {
        method: (
            _COLOURS[index % len(_COLOURS)],
            _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
        )
        for index, method in enumerate(main)
    }


def separates(located: Sequence[_Located]) -> bool:
    """Whether at least half of the methods have another value than the unreduced model."""
    base = [value for value, setting in located if setting.method == BASELINE]
    methods: dict[str, list[float]] = {}
    for value, setting in located:
        if setting.method != BASELINE:
            methods.setdefault(setting.method, []).append(value)
    if not base or not methods:
        return True
    moved = [any(abs(v - base[0]) > _SAME * base[0] for v in of) for of in methods.values()]
    return 2 * sum(moved) >= len(moved)


def front_of(located: Sequence[_Located], more_is_better: bool) -> list[_Located]:
    """The settings that no other beats in both value and accuracy, by value from the best on."""
    sign = -1 if more_is_better else 1
    costs = [(sign * value, setting.accuracy) for value, setting in located]
    return [located[index] for index in pareto(costs)]


def _draw(
    figure: Any,
    located: Sequence[_Located],
    axis: PlotAxis,
    spreads: Spreads,
    styles: Mapping[str, tuple[str, str]],
    name: str,
) -> None:
    axes = figure.add_subplot()
    curves: dict[str, list[_Located]] = {}
    for pair in sorted(located, key=lambda pair: (pair[0], pair[1].accuracy)):
        curves.setdefault(pair[1].method, []).append(pair)
    base = curves.pop(BASELINE, [])
    front = front_of(located, axis.more_is_better)
    on_front = {setting.method for _, setting in front}
    main = [m for m in styles if m in curves and (m in on_front or m == FLAGSHIP)]
    labels: list[tuple[str, list[_Located], str, bool]] = []
    for method in (method for method in curves if method not in main):
        _grey_line(axes, curves[method])
        labels.append((method, curves[method], _LABEL_GREY, False))
    for index, method in enumerate(main):
        colour, marker = styles[method]
        _line(axes, curves[method], spreads, colour, marker, 4 - 0.1 * index)
        labels.append((method, curves[method], colour, True))
    for value, setting in base:
        axes.axhline(setting.accuracy, color="black", linewidth=0.8, linestyle=":", zorder=0)
        _line(axes, [(value, setting)], spreads, "black", "*", 5, markersize=13)
        labels.append((BASELINE, base, "black", True))
    x, y = ([pair[0] for pair in front], [pair[1].accuracy for pair in front])
    axes.plot(x, y, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    _frame(axes, axis, name, others=len(curves) - len(main))
    _label(figure, axes, labels)


def _frame(axes: Any, axis: PlotAxis, name: str, others: int) -> None:
    title = f"{axis.title}   better →" if axis.more_is_better else f"← better   {axis.title}"
    axes.set_xlabel(title)
    axes.set_ylabel("accuracy, %")
    axes.set_title(name, loc="left", fontsize=11)
    grey = f"; grey: {others} other method{'s' * (others > 1)}" if others else ""
    note = f"dotted: Pareto front; bands and bars: 95 %{grey}"
    axes.set_title(note, loc="right", fontsize=8, color=_LABEL_GREY)
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.07)


def _grey_line(axes: Any, curve: Sequence[_Located]) -> None:
    x, y = [value for value, _ in curve], [setting.accuracy for _, setting in curve]
    axes.plot(x, y, color=_GREY, marker="o", markersize=3, linewidth=1, zorder=1)


def _line(
    axes: Any,
    curve: Sequence[_Located],
    spreads: Spreads,
    colour: str,
    marker: str,
    zorder: float,
    markersize: float = 6,
) -> None:
    """One method: its settings with their intervals, and the single seeds where there are
    several."""
    x = [value for value, _ in curve]
    y = [setting.accuracy for _, setting in curve]
    margin = [half_width(setting, spreads) for _, setting in curve]
    if len(curve) > 1:
        low, high = ([v + sign * m for v, m in zip(y, margin, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=margin, color=colour, capsize=3, linewidth=1, zorder=zorder)
    style = {"markersize": markersize, "markeredgecolor": "white", "markeredgewidth": 0.6}
    axes.plot(x, y, color=colour, marker=marker, linewidth=1.6, zorder=zorder, **style)
    dots = [
        (value, row["accuracy"])
        for value, setting in curve
        if len(setting.rows) > 1
        for row in setting.rows
    ]
    if dots:
        axes.scatter(
            *zip(*dots, strict=True), s=10, color=colour, alpha=0.35, linewidths=0, zorder=1
        )


def _label(figure: Any, axes: Any, labels: Sequence[tuple[str, list[_Located], str, bool]]) -> None:
    """Write names at the ends of lines, where they cover the least of lines and other names.

    Main names come first and are always written; a grey one only where there is room.
    """
    figure.draw_without_rendering()  # fixes the layout, in which extents are known
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    lines = [_samples(axes, curve) for _, curve, _, _ in labels]
    for text, curve, _, _ in labels:
        if text == BASELINE:  # whose accuracy is a line across the plot
            ends = [(x, curve[0][1]) for x in axes.get_xlim()]
            lines.append(_samples(axes, ends, per_segment=200))
    occupied: list[Any] = []
    for text, curve, colour, is_main in sorted(labels, key=lambda label: not label[3]):
        trials: list[tuple[float, int, Any, Any]] = []
        for value, setting in (curve[-1], curve[0], *curve[1:-1]) if is_main else curve[-1:]:
            for offset, side in _OFFSETS if is_main else _OFFSETS[:6]:
                note = axes.annotate(
                    text,
                    (value, setting.accuracy),
                    xytext=offset,
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    fontsize=9 if is_main else 7,
                    fontweight="bold" if text == FLAGSHIP else None,
                    color=colour,
                    zorder=7,
                    bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6},
                )
                extent = note.get_window_extent()
                note.remove()
                outside = (
                    extent.x1 > figure.bbox.x1 - 8
                    or extent.x0 < frame.x0
                    or extent.y1 > frame.y1
                    or extent.y0 < frame.y0
                )
                overlaps = sum(extent.overlaps(other) for other in occupied)
                covered = sum(extent.contains(*point) for line in lines for point in line)
                penalty = 50 * outside + 20 * overlaps + covered
                trials.append((penalty + 0.5 * len(trials) * is_main, len(trials), note, extent))
        penalty, _, note, extent = min(trials, key=lambda trial: trial[:2])
        if is_main or penalty == 0:
            axes.add_artist(note)
            occupied.append(extent)


def _samples(axes: Any, curve: Sequence[_Located], per_segment: int = 24) -> list[Any]:
    """Points along a line, in pixels."""
    corners = axes.transData.transform([(value, setting.accuracy) for value, setting in curve])
    shares = [step / per_segment for step in range(per_segment)]
    between = [
        start + share * (end - start) for start, end in pairwise(corners) for share in shares
    ]
    return [*between, corners[-1]]


_OFFSETS = (
    ((8, 0), "left"),
    ((8, 8), "left"),
    ((8, -8), "left"),
    ((-8, 0), "right"),
    ((-8, 8), "right"),
    ((-8, -8), "right"),
    ((0, 11), "center"),
    ((0, -11), "center"),
    ((0, 20), "center"),
    ((0, -20), "center"),
)
"""Where a label may lie from its point, in points, and how it is aligned there."""
