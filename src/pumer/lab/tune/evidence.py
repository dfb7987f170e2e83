"""The evidence of a search: a row for every point, and why nothing was accepted."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import optuna

from pumer._files import replacing
from pumer.lab.bench import records
from pumer.lab.tune.points import Planned
from pumer.lab.tune.search import Search, Verdict
from pumer.reducers import to_dict


def nearest_point(search: Search) -> str:
    """Error text: why nothing was accepted, and the nearest point."""
    bounds = search.bounds
    judged = [candidate for candidate in search.planned if candidate.point.name in search.judged]
    if not judged:
        return "no point of the grid was judged: allow more --trials, or loosen the bound"

    def verdict_on(candidate: Planned) -> Verdict:
        return search.checked.get(candidate.point.name) or search.judged[candidate.point.name]

    measured = {
        candidate.point.name: search.study.user_attrs[f"measured/{candidate.point.name}"]
        for candidate in judged
        if search.status(candidate) == "unfit"
    }
    if measured:  # which kept to the bound on the drop

        def short(name: str) -> float:
            speedup, memory = measured[name]
            return max((bounds.speedup or 0.0) / speedup, memory / (bounds.memory or math.inf))

        name = min(measured, key=short)
        speedup, memory = measured[name]
        return (
            "none of the settings that passed their check keeps to the bound when it is measured; "
            f"the nearest is {name}, {speedup:.2f} times as fast, {memory / 1e6:.0f} MB, which "
            f"loses {search.checked[name].drop:.2f} points. Loosen the bound, or widen the grid"
        )
    assert bounds.drop is not None  # without it every point passes its check
    nearest = min(judged, key=lambda candidate: verdict_on(candidate).high)
    verdict = verdict_on(nearest)
    return (
        f"no setting of the grid provably loses at most {bounds.drop:g} points; "
        f"the nearest is {nearest.point.name}, {nearest.speedup:.2f} times as fast by prediction, "
        f"which loses {verdict.drop:.2f} ({verdict.low:.2f} to {verdict.high:.2f}) on "
        f"{verdict.examples} examples. --max_drop {math.ceil(100 * verdict.high) / 100:.2f} may "
        "take it in; milder settings in the grid or more examples may help"
    )


def evidence_rows(
    search: Search, study: optuna.Study, best: Planned | None
) -> list[dict[str, Any]]:
    """One row per point, the best first, then by predicted speed."""
    excluded, attributes, rows = search.excluded(), study.user_attrs, []
    where = records.environment(next(search.model.parameters()).device)
    for candidate in search.planned:
        name = candidate.point.name
        judged, checked = search.judged.get(name), search.checked.get(name)
        measured = attributes.get(f"measured/{name}", [None, None])
        status = search.status(candidate) or excluded.get(name, "not reached")
        rows.append(
            {
                "point": name,
                "reducer": json.dumps(to_dict(candidate.point.reducer)),
                "status": "found" if candidate is best else status,
                "examples": judged.examples if judged else 0,
                **_drops("", judged),
                "check_examples": checked.examples if checked else 0,
                **_drops("check_", checked),
                "flops_ratio": round(candidate.flops_ratio, 4),
                "predicted_x": round(candidate.speedup, 4),
                "measured_x": "" if measured[0] is None else round(measured[0], 4),
                "predicted_bytes": "" if candidate.memory is None else candidate.memory,
                "measured_bytes": "" if measured[1] is None else measured[1],
                "batch_size": search.pool.batch_size,
                **where,
            }
        )
    return sorted(rows, key=lambda row: row["status"] != "found")


def _drops(prefix: str, verdict: Verdict | None) -> dict[str, Any]:
    values = (verdict.drop, verdict.low, verdict.high) if verdict else ("", "", "")
    return dict(zip((f"{prefix}drop", f"{prefix}low", f"{prefix}high"), values, strict=True))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the evidence as a CSV file."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
