"""Whether what `pumer tune` accepts holds.

    python benchmarks/scripts/tune_seeds.py OUT [RUNS] [HELD_OUT] [OPTION VALUE ...]

Tunes scenes-vilt RUNS times with other seeds of search and questions, each in a folder of its own
in OUT, and measures what the found setting loses on HELD_OUT other questions. Options are those of
`pumer tune`. A run that was stopped goes on, and several processes share the runs.
"""

import json
import sys
from pathlib import Path

import pumer
from pumer._files import claimed
from pumer.cli import main
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.tune.examples import ExamplePool
from pumer.lab.tune.sequential import PairedDrop
from pumer.presets import read_reducer

out = Path(sys.argv[1])
runs, held_out = (int(value) for value in (*sys.argv[2:4], *("10", "8000")[len(sys.argv[2:4]) :]))
options = sys.argv[4:] or ["--max_drop", "1.0"]
bound = float(options[options.index("--max_drop") + 1])
net = pumer.remove(open_model("scenes-vilt", None))


def lost(seed):
    """Tune with a seed, and measure the loss in points with its interval; empty if nothing was
    found."""
    task = json.dumps({"name": "scenes", "questions": 24000, "seed": seed})
    folder = out / str(seed)
    arguments = [
        "--model",
        "scenes-vilt",
        "--out",
        str(folder),
        "--task",
        task,
        "--seed",
        str(seed),
    ]
    if main(["tune", *arguments, "--resume", "true", *options]):
        return []
    collator = open_task(
        "scenes-vilt", net, {"name": "scenes", "questions": held_out, "seed": 1000 + seed}
    )
    pool = ExamplePool(collator.task.examples("test"), collator, 32, held_out)
    scores = []
    for reducer in (pumer.Unreduced(), read_reducer(str(folder / "reducer.yaml"))):
        with pumer.reduced(net, reducer):
            scores.append(
                [score for batch in pool.scores(net, range(held_out // 32)) for score in batch]
            )
    test = PairedDrop(0.05)
    test.update(a - b for a, b in zip(*scores, strict=True))
    return [100 * value for value in (test.mean, test.lower, test.upper)]


held, done = 0, 0
for seed in range(1, runs + 1):
    with claimed(out / f"held-{seed}") as lock:
        if lock is None:
            continue
        known = out / f"held-{seed}" / "lost.json"
        if not known.exists():
            known.write_text(json.dumps(lost(seed)))
        found = json.loads(known.read_text())
    done += 1
    if not found:
        print(f"seed {seed}: nothing found", flush=True)
        continue
    held += found[0] <= bound
    interval = "{:.2f} ({:.2f} to {:.2f})".format(*found)
    print(
        f"seed {seed}: {read_reducer(str(out / str(seed) / 'reducer.yaml'))} loses {interval} "
        "held out",
        flush=True,
    )
print(f"{held} of {done} within {bound:g} points")
