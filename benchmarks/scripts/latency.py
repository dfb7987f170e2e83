"""Measure the error of `pumer tune`'s latency model.

    python benchmarks/scripts/latency.py STUDY [BATCH] [RUNS]

Fits the model to the few forwards that `pumer tune` times, then times other settings: those of a
study's training-free reducers. Prints predicted and measured speed-up over the
unreduced model.
"""

import statistics
import sys

import pumer
from pumer.lab.bench.latency import calibrate, measure
from pumer.lab.bench.run import FUSED
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.study.points import read_study
from pumer.lab.tune.examples import ExamplePool
from pumer.reducers import from_dict

study = read_study(sys.argv[1])
batch, runs = (int(value) for value in (*sys.argv[2:], *("32", "9")[len(sys.argv) - 2 :]))
settings = {f"{point.method}, {point.label}": point for point in study.candidates()[0]}
reducers = {
    name: reducer
    for name, point in settings.items()
    if point.image_size is None
    and (reducer := from_dict(point.reducer)) != pumer.Unreduced()
    and not reducer.traits.learned
}
net = pumer.remove(open_model(study.model, None))
collator = open_task(study.model, net, dict(study.task))
pool = ExamplePool(collator.task.examples("test"), collator, batch, batch)
pool.size(1)
inputs = pool.inputs(0)
model = calibrate(net, inputs)
seconds, reports = measure(net, inputs, reducers, runs)
errors = []
print(f"{study.name}\npredicted  measured  off     setting")
for name in reducers:
    guess = model.seconds(reports[FUSED]) / model.seconds(reports[name])
    measured = seconds[FUSED] / seconds[name]
    errors.append(abs(guess / measured - 1))
    print(f"{guess:8.2f}x {measured:8.2f}x {100 * (guess / measured - 1):+5.1f} %  {name}")
print(
    f"off by {100 * statistics.median(errors):.1f} % in the median, {100 * max(errors):.1f} % at "
    "most"
)
