"""`pumer tune`."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import pumer
from pumer._extras import need
from pumer._files import fingerprint
from pumer._options import Count, OutputFolder, Probability
from pumer._shipped import model_folder
from pumer._terminal import console
from pumer.hub.sources import is_hub_name
from pumer.lab.bench.settings import Device
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.train.recipe import read_recipe
from pumer.lab.tune.finetune import finetune as finetune_
from pumer.lab.tune.points import Bounds
from pumer.lab.tune.space import SearchGrid

if TYPE_CHECKING:
    from pumer.lab.tune.run import Tuned

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def tune_(
    model: str,
    out: OutputFolder,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    max_memory: str | None = None,
    task: str | dict[str, Any] | None = None,
    split: str = "val",
    grid: SearchGrid | None = None,
    skip_impossible: bool = False,
    batch_size: Count = 32,
    choose: Count = 2000,
    check: Count = 8000,
    alpha: Probability = 0.1,
    trials: Count = 80,
    seed: int = 0,
    finetune: str | None = None,
    processes: Count = 1,
    resume: bool = False,
    device: Device = "auto",
) -> None:
    """Find the best setting of PuMer or ToMe for a model and a task, within bounds.

    The fastest one that loses at most `max_drop` points, or without that bound the one that loses
    least, among those that meet the other bounds.

    Args:
        model: folder of a saved model, or a shipped one's name; used unreduced.
        out: folder for the preset, the evidence, the plot and the state of a resumable run.
        max_drop: largest loss of accuracy against the unreduced model, in points.
        min_speedup: smallest speed-up over the unreduced model, on this machine.
        max_memory: weights and activations of a forward, such as 300MB or 1.5GiB.
        task: a task's name (`pumer list`); its settings are given as --task.root DIR; 24000
            questions of scenes if not given.
        split: labelled examples to choose and to check on.
        grid: the values to search.
        skip_impossible: skip settings of the grid that do not fit the model.
        batch_size: examples at a time; speed and memory are for this size.
        choose: examples to choose on.
        check: other examples to check the choice on.
        alpha: probability of accepting a setting that loses more than `max_drop`.
        trials: largest number of settings to judge.
        seed: seed of the order of examples and of the search.
        finetune: recipe of `pumer train` to continue with: distillation from the unreduced model at
            the setting found.
        processes: processes that this training runs in.
        resume: continue the search in `out`.
        device: "auto" takes a CUDA device if there is one.
    """
    need("pumer tune", "tune", "matplotlib", "optuna", "scipy")
    from pumer.lab.tune.run import lost, tune

    if finetune is not None:
        read_recipe(finetune)  # now rather than after the search
    bounds = Bounds(max_drop, min_speedup, None if max_memory is None else read_size(max_memory))
    screen = console()
    started = time.perf_counter()
    task = {"name": "scenes", "questions": 24000} if task is None else task
    net = pumer.remove(open_model(model, None, device))
    collator = open_task(model, net, task)
    examples = collator.task.examples(split)
    tuned = tune(
        net,
        examples,
        collator,
        bounds,
        out,
        grid=grid,
        skip_impossible=skip_impossible,
        batch_size=batch_size,
        choose=choose,
        check=check,
        alpha=alpha,
        trials=trials,
        seed=seed,
        resume=resume,
        settings={"model": model, "weights": _weights(model), "task": task, "split": split},
        log=lambda line: screen.print(
            line, style="dim", markup=False, highlight=False, soft_wrap=True
        ),
    )
    _summary(screen, tuned, out, time.perf_counter() - started)
    if finetune is not None:
        trained = finetune_(
            finetune, model_folder(model), tuned.point.point.reducer, f"{out}/finetune", processes
        )
        after = lost(
            net,
            open_model(str(trained), None, device),
            examples,
            collator,
            batch_size,
            choose,
            check,
            alpha,
            seed,
        )
        screen.print(
            f"fine-tuned, {trained} loses {after.mean * 100:.2f} points ({after.lower * 100:.2f} "
            f"to {after.upper * 100:.2f}) on {after.number} fresh examples; before that "
            f"{tuned.checked.drop:.2f} on {tuned.checked.examples} of them"
        )


def _weights(model: str) -> str:
    """What identifies the model when a search is resumed; empty for a model on the Hub."""
    return "" if is_hub_name(model) else fingerprint(model_folder(model))


def read_size(text: str) -> int:
    """Bytes in a size such as 300MB, 1.5 GiB or 1000000; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"--max_memory is a size such as 300MB or 1.5GiB, not {text!r}")
    return round(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _summary(screen: Console, tuned: Tuned, out: str, seconds: float) -> None:
    from pumer.lab.tune.run import EVIDENCE, PRESET

    judged = sum(1 for row in tuned.rows if row["examples"])
    point, checked = tuned.point.point, tuned.checked
    table = Table(title=point.name, show_header=False)
    for name, value in (
        (
            "points lost, on fresh examples",
            f"{checked.drop:.2f} ({checked.low:.2f} to {checked.high:.2f})",
        ),
        ("fresh examples", str(checked.examples)),
        ("times as fast, measured", f"{tuned.speedup:.2f}"),
        ("times as fast, predicted", f"{tuned.point.speedup:.2f}"),
        ("times fewer FLOPs", f"{tuned.point.flops_ratio:.2f}"),
        ("weights and activations", f"{tuned.memory / 1e6:.1f} MB"),
        ("settings judged", f"{judged} of {tuned.points}"),
        ("examples predicted", f"{tuned.predictions}"),
        ("seconds", f"{seconds:.0f}"),
    ):
        table.add_row(name, value)
    screen.print(table)
    screen.print(
        f"preset: {out}/{PRESET}; evidence: {out}/{EVIDENCE}; plot: {out}/tune.png and .svg"
    )
