"""Where what `pumer tune` found lies among all settings.

    python benchmarks/scripts/tune_grid.py OUT [EXAMPLES] [EVERY]

OUT is the folder of a finished `pumer tune` on scenes-VQA. Scores the unreduced model and every
EVERY-th setting of its candidates.csv (the found one always) on the same EXAMPLES questions of a
seed that no tuning has seen, and says which settings certainly dominate the found one: predicted to
be faster, and by the paired test better. Scores are kept in OUT/grid.jsonl, so a run that was
stopped goes on.
"""

import csv
import json
import sys
from pathlib import Path

import pumer
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.tune.examples import ExamplePool
from pumer.lab.tune.sequential import PairedDrop
from pumer.presets import read_reducer

SEED, BATCH = 77, 32
out = Path(sys.argv[1])
examples, every = (int(value) for value in (*sys.argv[2:], *("2000", "1")[len(sys.argv) - 2 :]))
rows = list(csv.DictReader((out / "candidates.csv").open()))
found = next(row for row in rows if row["status"] == "found")
chosen = [found, *(row for row in rows[1::every])]

net = pumer.remove(open_model("scenes-vilt", None))
collator = open_task("scenes-vilt", net, {"name": "scenes", "questions": examples, "seed": SEED})
pool = ExamplePool(collator.task.examples("test"), collator, BATCH, examples)
cache = out / "grid.jsonl"
scores = dict(map(json.loads, cache.read_text().splitlines())) if cache.exists() else {}
reducers = {"base": pumer.Unreduced()} | {
    row["point"]: read_reducer(json.loads(row["reducer"])) for row in chosen
}
for name, reducer in reducers.items():
    if name not in scores:
        with pumer.reduced(net, reducer):
            scores[name] = [
                score for batch in pool.scores(net, range(examples // BATCH)) for score in batch
            ]
        with cache.open("a") as file:
            file.write(json.dumps([name, scores[name]]) + "\n")


def drop(name, against="base"):
    test = PairedDrop(0.05)
    test.update(a - b for a, b in zip(scores[against], scores[name], strict=True))
    return test


print("predicted_x  drop (low to high)  setting")
front, best = [], float("inf")
for row in sorted(chosen, key=lambda row: -float(row["predicted_x"])):
    lost = drop(row["point"])
    if lost.mean < best:
        best = lost.mean
        front.append(row["point"])
        interval = f"{100 * lost.mean:5.2f} ({100 * lost.lower:.2f} to {100 * lost.upper:.2f})"
        print(f"{float(row['predicted_x']):11.2f}  {interval}  {row['point']}")
faster = [row["point"] for row in chosen if float(row["predicted_x"]) > float(found["predicted_x"])]
better = [name for name in faster if drop(name, found["point"]).upper < 0]
print(f"found: {found['point']}, loses {100 * drop(found['point']).mean:.2f}")
print(f"on the front as measured: {found['point'] in front}")
print(
    f"of {len(faster)} faster settings {len(better)} certainly lose less: "
    f"{', '.join(better) or 'none'}"
)
