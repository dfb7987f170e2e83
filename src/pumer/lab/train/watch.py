"""Log lines of a training, and stopping at NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

_UNSAID = ("epoch", "total_flos", "runtime", "samples_per_second", "steps_per_second")


class Bar(ProgressCallback):
    """The Trainer's progress bar, without printing its log as dicts."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Replaced by `ReadableLog`."""


class ReadableLog(TrainerCallback):
    """The Trainer's log as readable lines, the first of which describes the data.

    Args:
        data: description of the data.
        output: where the model will be written.
    """

    def __init__(self, data: str, output: Path) -> None:
        self.data, self.output = data, output

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print what is trained."""
        if state.is_world_process_zero:
            done = f" ({state.global_step} of them done)" if state.global_step else ""
            tqdm.write(
                f"training on {self.data}; {state.max_steps} steps{done}; the model will be in "
                f"{self.output}"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print an entry of the log as a line."""
        if state.is_world_process_zero and (
            line := log_line(logs or {}, state.global_step, state.max_steps)
        ):
            tqdm.write(line)


def log_line(logs: Mapping[str, float], step: int, steps: int) -> str:
    """One line of the Trainer's log; accuracy is in percent."""
    step_of_all = f"step {step}/{steps}"
    if "train_runtime" in logs:
        return f"{step_of_all}: trained in {logs['train_runtime'] / 60:.1f} min"
    evaluated = any(name.startswith("eval_") for name in logs)
    parts = []
    for name, value in logs.items():
        name = name.removeprefix("eval_")
        if name.startswith(_UNSAID):
            continue
        if name == "accuracy":
            parts.append(f"accuracy {value:.2f} %")
        else:
            figure = float(value)
            parts.append(
                f"{name.replace('_', ' ')} {figure:{'.2e' if name == 'learning_rate' else '.4g'}}"
            )
    return f"{step_of_all}{' evaluated' if evaluated else ''}: {', '.join(parts)}" if parts else ""


class FirstFailure:
    """The first step whose loss is not finite, tracked on the loss's device without
    synchronizing."""

    def __init__(self) -> None:
        self._step: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Record the loss of a step."""
        failed = torch.where(loss.detach().float().isfinite(), math.inf, float(step))
        self._step = failed if self._step is None else torch.minimum(self._step, failed)

    def read(self) -> int | None:
        """The failed step, or None; synchronizes with the device."""
        step = math.inf if self._step is None else self._step.item()
        return None if math.isinf(step) else int(step)


class StopAtNaN(TrainerCallback):
    """Stop at a loss or weight that is not finite, before anything is logged, scored or saved.

    On a GPU the loss is only checked where the Trainer synchronizes anyway; the step reported is
    still the first one.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the loss wherever the Trainer synchronizes, and weights before they are saved."""
        waits = (
            control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
        )
        if waits or args.device.type == "cpu":
            self._check(args, state, weights=control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(args, state, weights=control.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check loss and weights."""
        self._check(args, state, weights=True)

    def _check(self, args: Any, state: Any, weights: bool) -> None:
        step, what = self.trainer.failure.read(), "the loss is"
        if step is None and weights:
            bad = [
                name for name, x in self.trainer.model.named_parameters() if not x.isfinite().all()
            ]
            step, what = (
                (state.global_step, f"{len(bad)} weights, {bad[0]} the first, are")
                if bad
                else (None, "")
            )
        if step is not None:
            raise ValueError(
                f"{what} not finite at step {step}, and nothing after it was saved: lower "
                f"trainer.learning_rate (it is {args.learning_rate:g}), warm up for longer, or set "
                f"trainer.max_grad_norm; checkpoints of earlier steps stay in {args.output_dir}"
            )
