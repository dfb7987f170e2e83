"""The results of a study as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pumer.lab.study.curves import (
    Difference,
    Quantity,
    Setting,
    difference,
    half_width,
    interpolate,
    on_curve,
    seed_spreads,
    settings_of,
)
from pumer.lab.study.points import BASELINE

MATCHED_FROM, MATCHED_STEP = 1.3, 0.1
_FEWEST_ROUNDS = 3  # from which the error of a speed can be estimated
_NOTES = """\
* Accuracy: in percent, mean over the seeds, with its 95 % interval. Δ: in points, of the same
  examples, which makes its interval narrower than those of the two accuracies. Intervals cover
  the choice of examples and, where there are several seeds, that of the seed; at the same
  measured speed-up, also how well the speeds are known.
* x unreduced: how many times the speed of the unreduced model with the same fused attention, the
  two taking turns in one process; median of the rounds, and from the 20th to the 80th percentile.
  What the unreduced model is off 1 against itself is the noise of the machine. "Without overhead"
  leaves out the time of choosing and reducing.
* GFLOPs: per example, two per multiply-accumulate, padding that is run and the reducer's own
  included.
* Tokens: text + image, mean after a layer over all layers and examples; ±: standard deviation of
  the image tokens over the examples, where a method decides by example.
* MiB: peak of the activations of a batch.
"""


def markdown(
    rows: Sequence[dict[str, Any]],
    speeds: Sequence[dict[str, Any]],
    references: Sequence[str] = (),
    plots: Sequence[str] = (),
) -> str:
    """All tables of a study.

    Args:
        rows: of the results, at least one.
        speeds: rows of the speeds.
        references: the methods that the others are compared with.
        plots: file names of plots to embed.
    """
    settings = settings_of(rows, speeds)
    first = rows[0]
    lines = [
        f"# {first['study']}",
        "",
        f"Model {first['model']}, task `{first['task']}`, {first['examples']} examples of "
        f"{first['split']}; {_training(rows)}, seeds "
        f"{', '.join(map(str, sorted({int(row['seed']) for row in rows})))}; "
        f"batches of {first['batch_size']}.",
        f"Results: {_machines(rows)}. Speeds: {_machines(speeds)}.",
        "",
        *_points(settings, references),
        "",
        _NOTES,
    ]
    for reference in references:
        lines += matched(settings, reference, "measured speed-up", _speed_up, _speed_up_error)
        lines += matched(settings, reference, "FLOPs ratio", _flops_ratio)
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def matched(
    settings: Sequence[Setting],
    reference: str,
    title: str,
    axis: Quantity,
    error: Quantity | None = None,
) -> list[str]:
    """Lines of a table: accuracy of the reference minus that of every other method at equal `axis`.

    Curves are interpolated linearly and end at their last setting. `error` is the standard error of
    a setting's value. Empty with fewer than two curves.
    """
    curves: dict[str, list[Setting]] = {}
    for setting in settings:
        curves.setdefault(setting.method, []).append(setting)
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if reference not in curves or len(curves) < 2:
        return []
    spreads = seed_spreads(settings)
    rivals = [name for name in curves if name != reference]
    longest = max(axis(setting) or 0.0 for setting in curves[reference])
    table = [["", f"{reference}, accuracy", *(f"less {name}" for name in rivals)]]
    verdicts: dict[str, dict[str, list[str]]] = {
        name: {"below": [], "no telling": [], "above": []} for name in rivals
    }
    for step in range(
        int((longest - MATCHED_FROM) / MATCHED_STEP + 1e-9) + 1 if longest >= MATCHED_FROM else 0
    ):
        where = round(MATCHED_FROM + step * MATCHED_STEP, 2)
        mine = interpolate(curves[reference], axis, where, error)
        if mine is None:
            continue
        counts = mine.parts[0][0].counts
        row = [f"{where:.1f}x", f"{100 * mine.scores.sum() / counts.sum():.1f}"]
        for name in rivals:
            other = interpolate(curves[name], axis, where, error)
            gap = None if other is None else difference(mine, other, spreads)
            row.append(_cell(gap))
            if gap is not None:
                verdicts[name][gap.verdict].append(f"{where:.1f}x")
        table.append(row)
    said = []
    for name, places_by_verdict in verdicts.items():
        parts = [
            f"{verdict} at {', '.join(places)}"
            for verdict, places in places_by_verdict.items()
            if places
        ]
        said.append(
            f"* {reference} against {name}: "
            f"{'; '.join(parts) or 'the curves have no part in common'}."
        )
    return [
        f"## {reference} at the same {title}",
        "",
        "Points of accuracy, with their 95 % intervals; between settings a curve is straight. "
        f"Bold: {reference} is below.",
        "",
        *_table(table),
        "",
        *said,
        "",
    ]


def _points(settings: Sequence[Setting], references: Sequence[str]) -> list[str]:
    """Lines of the table of all settings."""
    spreads = seed_spreads(settings)
    methods = [setting.method for setting in settings]
    # A method with several settings is no single reference.
    compared = [
        candidate
        for candidate in settings
        if candidate.method in (BASELINE, *references) and methods.count(candidate.method) == 1
    ]
    towers = any(setting.mean("gflops_towers") for setting in settings)
    head = [
        "method",
        "setting",
        "accuracy (95 %)",
        *(f"Δ {reference.method}" for reference in compared),
        "examples/s",
    ]
    head += ["x unreduced", "x without overhead", "GFLOPs (x fewer)", *["without towers"] * towers]
    table = [[*head, "MiB", "tokens", "seeds"]]
    for setting in settings:
        margin = half_width(setting, spreads)
        table.append(
            [
                setting.method,
                setting.label,
                f"{setting.accuracy:.1f} ({max(setting.accuracy - margin, 0):.1f} - "
                f"{min(setting.accuracy + margin, 100):.1f})",
                *(
                    ""
                    if setting is reference
                    else str(difference(on_curve(setting), on_curve(reference), spreads))
                    for reference in compared
                ),
                *_speeds(setting.speed),
                f"{setting.mean('gflops'):.3g} ({setting.flops_ratio:.2f})",
                *[_without_towers(setting)] * towers,
                f"{setting.mean('peak_bytes') / 2**20:.1f}",
                _tokens(setting),
                str(len(setting.rows)),
            ]
        )
    return _table(table)


def _speeds(speed: dict[str, Any] | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    x = speed["x_unreduced"]
    return (
        f"{speed['examples_per_s']:.1f}",
        f"{x:.2f} ({speed['x_low']:.2f} - {speed['x_high']:.2f})",
        f"{x / (1 - speed['overhead']):.2f}",
    )


def _training(rows: Sequence[dict[str, Any]]) -> str:
    """Which methods were trained."""
    without = dict.fromkeys(row["method"] for row in rows if not row["training"])
    if all(row["training"] for row in rows):
        return "trained"
    return (
        f"trained but for {', '.join(without)}"
        if any(row["training"] for row in rows)
        else "nothing trained"
    )


def _machines(rows: Sequence[dict[str, Any]]) -> str:
    """The machines and dates of rows."""
    names = ("cpu", "cores", "threads", "gpu", "torch", "transformers")
    descriptions = {
        ", ".join(f"{name} {row[name]}" for name in names if row[name] != "") for row in rows
    }
    dates = sorted({row["date"] for row in rows})
    return (
        "; ".join(sorted(descriptions)) + f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        if rows
        else "not timed"
    )


def _without_towers(setting: Setting) -> str:
    towers = [setting.mean(name) for name in ("gflops", "gflops_towers")]
    return f"{towers[0] - towers[1]:.3g}"


def _tokens(setting: Setting) -> str:
    text, image = setting.mean("average_text"), setting.mean("average_image")
    spread = setting.mean("image_spread")
    return f"{text:.0f} + {image:.0f}" + (f" ± {spread:.0f}" if spread >= 0.5 else "")


def _cell(gap: Difference | None) -> str:
    if gap is None:
        return "no curve"
    return f"**{gap}**" if gap.verdict == "below" else str(gap)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *body]


def _speed_up(setting: Setting) -> float | None:
    return setting.speed_up if setting.rounds >= _FEWEST_ROUNDS else None


def _speed_up_error(setting: Setting) -> float | None:
    return setting.speed_up_error


def _flops_ratio(setting: Setting) -> float:
    return setting.flops_ratio
