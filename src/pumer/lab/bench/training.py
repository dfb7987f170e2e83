"""Steps of training side by side: unreduced and reduced, each with and without a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pumer.adapters import find
from pumer.api import active, apply, unreduced
from pumer.costs.report import last_forward_macs
from pumer.costs.result import GIGA, align
from pumer.lab.bench import models
from pumer.lab.bench.memory import peak_activations
from pumer.lab.bench.records import environment
from pumer.lab.bench.results import Measured
from pumer.lab.bench.run import Device, ReducerSpec, name_reducers, using_threads
from pumer.lab.bench.timing import Timing, alternate
from pumer.reducers import Unreduced

BASE = "unreduced"
_BACKWARD = 2
"""What a backward costs, in forwards: the gradients of the inputs and those of the weights."""


@dataclass(frozen=True)
class Step:
    """What was measured of one way to train.

    Args:
        variant: "unreduced" or the reducer's name.
        teacher: whether an unreduced model's forward goes along.
        timing: of a step: forward, loss, backward, AdamW; in seconds.
        macs: multiply-accumulates of a step per example, those of the teacher included.
        peak_bytes: peak memory beyond weights, gradients and optimizer states.
        x_base: speed-up against the unreduced step with, or without, the teacher as this one.
        flops_ratio: how many times fewer FLOPs than that step: what the speed-up could be.
    """

    variant: str
    teacher: bool
    timing: Timing
    macs: int
    peak_bytes: int
    x_base: float
    flops_ratio: float


COLUMNS = (
    *environment(),
    "model",
    "batch",
    "text",
    "device",
    "attention",
    "runs",
    "variant",
    "teacher",
    "median_s",
    "p20_s",
    "p80_s",
    "gmacs",
    "x_base",
    "flops_ratio",
    "flops_share",
    "peak_bytes",
)
"""Columns of `TrainingBench.records`."""


class TrainingBench(Measured[Step]):
    """Steps, two of a variant where both kinds of teacher were asked for, see `Measured`."""

    def records(self) -> list[dict[str, Any]]:
        """One flat row per step, for a CSV file."""
        return [
            {
                **self.environment,
                **self.settings,
                "variant": step.variant,
                "teacher": step.teacher,
                "median_s": f"{step.timing.median:.6g}",
                "p20_s": f"{step.timing.p20:.6g}",
                "p80_s": f"{step.timing.p80:.6g}",
                "gmacs": f"{step.macs / GIGA:.6g}",
                "x_base": f"{step.x_base:.4g}",
                "flops_ratio": f"{step.flops_ratio:.4g}",
                "flops_share": f"{step.x_base / step.flops_ratio:.4g}",
                "peak_bytes": step.peak_bytes,
            }
            for step in self.rows
        ]

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("", "teacher", "ms", "p20 - p80", "x base", "ratio", "seen", "MiB", "of base")
        ]
        base = {step.teacher: step for step in self.rows if step.variant == BASE}
        for step in self.rows:
            lines.append(
                (
                    step.variant,
                    "yes" if step.teacher else "no",
                    f"{1e3 * step.timing.median:.0f}",
                    f"{1e3 * step.timing.p20:.0f} - {1e3 * step.timing.p80:.0f}",
                    f"{step.x_base:.2f}",
                    f"{step.flops_ratio:.2f}",
                    f"{step.x_base / step.flops_ratio:.0%}",
                    f"{step.peak_bytes / 2**20:.0f}",
                    f"{step.peak_bytes / base[step.teacher].peak_bytes:.0%}",
                )
            )
        return "\n".join(
            [
                *self.heading(),
                *align(lines, left=1),
                "",
                "ms: median of a step: forward, loss, backward, AdamW. x base: against unreduced, "
                "the teacher alike.",
                "ratio: FLOPs of that step over these. seen: x base as a share of that ratio.",
                "MiB: peak beyond weights, gradients and optimizer states.",
            ]
        )


def bench_training(
    model: str = "vilt-b32",
    reducers: Sequence[ReducerSpec] | None = None,
    batch: int = 4,
    teachers: Sequence[bool] = (False, True),
    text: int = 40,
    real_text: tuple[int, int] = (8, 16),
    device: Device = "auto",
    attention: Literal["sdpa", "eager"] = "sdpa",
    threads: int | None = None,
    runs: int = 5,
    progress: Callable[[], None] = lambda: None,
) -> TrainingBench:
    """Measure steps of training: the unreduced model and each reducer, with and without a teacher.

    Args:
        model: a name in `bench.models.CONFIGS`.
        reducers: as for `bench`.
        batch: examples at a time.
        teachers: measure without a teacher, with one, or both.
        text: text tokens, padding included.
        real_text: fewest and most real text tokens of an example.
        device: "auto" takes a CUDA device if there is one.
        attention: kernel of reduced, unreduced and teacher.
        threads: CPU threads; torch's own choice if not given.
        runs: timed steps of each.
        progress: called after every round of steps.

    Raises:
        ValueError: for unknown names, settings that do not fit, and a device that is not there.
    """
    named = {
        BASE: Unreduced(),
        **name_reducers(models.default_reducers(model) if reducers is None else reducers),
    }
    resolved_device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if resolved_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: give --device cpu")
    settings = {
        "model": model,
        "batch": batch,
        "text": text,
        "device": resolved_device,
        "attention": attention,
        "runs": runs,
    }
    with using_threads(threads):
        net = models.build(model).to(resolved_device)
        if find(net).tower_depth(net):
            net.set_attn_implementation(attention)  # of the towers, which the adapter leaves alone
        data = models.inputs(net, batch, models.image_size(model), text, real_text)
        target = torch.rand(batch, net.config.num_labels, device=resolved_device)
        teacher = apply(copy.deepcopy(net), Unreduced(), attention=attention)
        calls: dict[tuple[str, bool], Callable[[], None]] = {}
        macs: dict[str, int] = {}
        for name, reducer in named.items():
            student = apply(copy.deepcopy(net), reducer, attention=attention).train()
            optimizer = torch.optim.AdamW(student.parameters(), fused=True)  # as the Trainer has it
            for taught in teachers:
                calls[name, taught] = _step(
                    student, teacher if taught else None, optimizer, data, target
                )
            calls[name, teachers[0]]()
            macs[name] = _macs(student, macs.get(BASE))
        timings = alternate(
            {f"{name} {taught}": call for (name, taught), call in calls.items()},
            runs,
            1,
            resolved_device,
            progress,
        )
        peaks = {key: peak_activations(call, resolved_device) for key, call in calls.items()}
    steps = []
    for name, taught in calls:
        step_macs = {n: macs[n] + taught * macs[BASE] // (1 + _BACKWARD) for n in (BASE, name)}
        timing = timings[f"{name} {taught}"]
        steps.append(
            Step(
                name,
                taught,
                timing,
                step_macs[name],
                peaks[name, taught],
                timings[f"{BASE} {taught}"].median / timing.median,
                step_macs[BASE] / step_macs[name],
            )
        )
    return TrainingBench(settings, environment(resolved_device), tuple(steps))


def _step(
    student: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    data: dict[str, Tensor],
    target: Tensor,
) -> Callable[[], None]:
    patch = active(student)
    assert patch is not None
    learned = patch.reducer.traits.learned

    def call() -> None:
        loss = torch.zeros((), device=target.device)
        if learned is not None and learned.self_distils:
            with unreduced(student):
                loss = loss + functional.binary_cross_entropy_with_logits(
                    student(**data).logits, target
                )
        logits = student(**data).logits
        loss = loss + functional.binary_cross_entropy_with_logits(logits, target)
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(**data).logits
            loss = loss + functional.kl_div(
                logits.log_softmax(-1), taught.softmax(-1), reduction="batchmean"
            )
        price = patch.budget_loss()
        (loss if price is None else loss + price).backward()
        optimizer.step()
        optimizer.zero_grad(
            set_to_none=False
        )  # allocated once, so that they are no part of a step's peak

    return call


def _macs(student: nn.Module, base: int | None) -> int:
    """Multiply-accumulates of a step per example without a teacher's, `base` being those of the
    unreduced step."""
    patch = active(student)
    assert patch is not None
    learned = patch.reducer.traits.learned
    if learned is None or base is None:
        return (1 + _BACKWARD) * last_forward_macs(student)
    return (2 if learned.self_distils else 1) * base  # trained parts are trained on all tokens
