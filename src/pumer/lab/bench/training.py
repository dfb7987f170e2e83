"""Training steps side by side: unreduced and reduced, each with and without a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
from pumer.lab.bench.run import REAL_TEXT, name_reducers, using_threads
from pumer.lab.bench.settings import TrainingBenchSettings, resolve_device
from pumer.lab.bench.timing import Timing, alternate
from pumer.lab.progress import Progress, no_progress
from pumer.reducers import Unreduced

BASE = "unreduced"
_BACKWARD = 2
"""What a backward costs, in forwards: the gradients of the inputs and those of the weights."""


@dataclass(frozen=True)
class TrainingStep:
    """Measurements of one way to train.

    Args:
        variant: "unreduced" or the reducer's name.
        teacher: whether the step includes an unreduced teacher's forward.
        timing: seconds of a step: forward, loss, backward, AdamW.
        macs: multiply-accumulates of a step per example, with the teacher's.
        peak_bytes: peak memory beyond weights, gradients and optimizer states.
        x_base: speed-up over the unreduced step, with a teacher if this one has one.
        flops_ratio: FLOPs of that step over these: the upper bound of the speed-up.
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


class TrainingBench(Measured[TrainingStep]):
    """Training steps, with both kinds of teacher where asked for; see `Measured`."""

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
    settings: TrainingBenchSettings,
    *,
    attention: Literal["sdpa", "eager"] = "sdpa",
    progress: Progress = no_progress,
) -> TrainingBench:
    """Measure training steps of the unreduced model and each reducer, with and without a teacher.

    Args:
        settings: what to measure, where, and how often.
        attention: kernel of reduced and unreduced model and of the teacher.
        progress: called with 1 after every round of steps.

    Raises:
        ValueError: for unknown names, settings that do not fit, and a missing device.
    """
    model, teachers = settings.model, settings.teachers or [False, True]
    named = {
        BASE: Unreduced(),
        **name_reducers(models.default_reducers(model), settings.reducers),
    }
    device, is_there = resolve_device(settings.device)
    if not is_there:
        raise ValueError("there is no CUDA device here: give --device cpu")
    columns = {
        "model": model,
        "batch": settings.batch,
        "text": settings.text,
        "device": device,
        "attention": attention,
        "runs": settings.runs,
    }
    with using_threads(settings.threads):
        net = models.build(model).to(device)
        if find(net).tower_depth(net):
            net.set_attn_implementation(
                attention
            )  # of the towers, which the adapter does not change
        size = models.image_size(model)
        data = models.inputs(net, settings.batch, size, settings.text, REAL_TEXT)
        target = torch.rand(settings.batch, net.config.num_labels, device=device)
        teacher = apply(copy.deepcopy(net), Unreduced(), attention=attention)
        calls: dict[tuple[str, bool], Callable[[], None]] = {}
        macs: dict[str, int] = {}
        for name, reducer in named.items():
            student = apply(copy.deepcopy(net), reducer, attention=attention).train()
            optimizer = torch.optim.AdamW(student.parameters(), fused=True)  # as in the Trainer
            for has_teacher in teachers:
                calls[name, has_teacher] = _step(
                    student, teacher if has_teacher else None, optimizer, data, target
                )
            calls[name, teachers[0]]()
            macs[name] = _macs(student, macs.get(BASE))
        labelled = {f"{name} {has_teacher}": call for (name, has_teacher), call in calls.items()}
        timings = alternate(labelled, settings.runs, 1, device, progress)
        peaks = {key: peak_activations(call, device) for key, call in calls.items()}
    rows = (_row(name, has_teacher, timings, macs, peaks) for name, has_teacher in calls)
    return TrainingBench(columns, environment(device), tuple(rows))


def _row(
    name: str,
    has_teacher: bool,
    timings: Mapping[str, Timing],
    macs: Mapping[str, int],
    peaks: Mapping[tuple[str, bool], int],
) -> TrainingStep:
    """A variant compared with the unreduced one, both with or without a teacher."""
    teacher_macs = has_teacher * macs[BASE] // (1 + _BACKWARD)
    timing, base = (timings[f"{variant} {has_teacher}"] for variant in (name, BASE))
    step_macs, base_macs = (macs[variant] + teacher_macs for variant in (name, BASE))
    return TrainingStep(
        variant=name,
        teacher=has_teacher,
        timing=timing,
        macs=step_macs,
        peak_bytes=peaks[name, has_teacher],
        x_base=base.median / timing.median,
        flops_ratio=base_macs / step_macs,
    )


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
                teacher_logits = teacher(**data).logits
            loss = loss + functional.kl_div(
                logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean"
            )
        price = patch.budget_loss()
        (loss if price is None else loss + price).backward()
        optimizer.step()
        optimizer.zero_grad(
            set_to_none=False
        )  # allocated once, so that they do not count in a step's peak

    return call


def _macs(student: nn.Module, base: int | None) -> int:
    """Multiply-accumulates of a step per example without a teacher; `base` are those of the
    unreduced step."""
    patch = active(student)
    assert patch is not None
    learned = patch.reducer.traits.learned
    if learned is None or base is None:
        return (1 + _BACKWARD) * last_forward_macs(student)
    return (2 if learned.self_distils else 1) * base  # learned reducers train on all tokens
