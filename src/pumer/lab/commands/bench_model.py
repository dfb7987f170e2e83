"""`pumer bench model`."""

from __future__ import annotations

from rich.progress import Progress

import pumer
from pumer._options import Count
from pumer._terminal import visible
from pumer.lab.bench.run import name_reducers
from pumer.lab.bench.saved import bench_saved
from pumer.lab.bench.settings import Device, ReducerSettings
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.data.images import open_image
from pumer.lab.evaluate import model_inputs
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks.base import Example
from pumer.lab.tasks.prompts import is_generative


def bench_model_(
    model: str,
    reducer: ReducerSettings = None,
    reducers: list[ReducerSettings] | None = None,
    image: str | None = None,
    question: str | None = None,
    batch: Count = 8,
    new_tokens: Count = 16,
    device: Device = "auto",
    threads: Count | None = None,
    runs: Count = 9,
) -> None:
    """Time a saved model and measure its memory on an image and a question: stock, fused and
    reduced, alternating in one process.

    Args:
        model: folder of a saved model, a shipped one's name, or a decoder's name on the Hub.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings are given as --reducer.SETTING VALUE; the model's own if not given.
        reducers: several of these.
        image: file of an image; generated ones if not given.
        question: about that image.
        batch: examples at a time; for generative models so many copies of one prompt.
        new_tokens: tokens of a generated answer.
        device: "auto" takes a CUDA device if there is one.
        threads: CPU threads; torch's own choice if not given.
        runs: timed calls of each.
    """
    if (image is None) != (question is None):
        raise ValueError(
            "an image of your own and its question go together: give --image and --question"
        )
    net = open_model(model, None, device)
    patch = pumer.active(net)
    wanted = [spec for spec in [reducer, *(reducers or [])] if spec is not None]
    if not wanted and patch is None:
        raise ValueError(f"nothing reduces {model}: give --reducer")
    named = (
        name_reducers(wanted) if wanted or patch is None else {patch.reducer.name: patch.reducer}
    )
    if image is not None and question is not None:
        examples = [Example(0, question, (open_image(image),), None, 0)] * batch
    else:
        generated = Scenes(questions=batch, seed=7).examples("test")
        examples = [generated[0 if is_generative(net) else index] for index in range(batch)]
    collator = open_task(model, net, {"name": "scenes"})
    data = model_inputs(collator(examples), net.device)
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=runs + 1)
        result = bench_saved(
            net,
            data,
            named,
            new_tokens=new_tokens if is_generative(net) else None,
            runs=runs,
            threads=threads,
            progress=lambda done: progress.advance(bar, done),
        )
    print(visible(f"{model}\n{result}"))
