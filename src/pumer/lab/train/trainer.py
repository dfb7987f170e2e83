"""transformers' Trainer with a task's loss and, optionally, distillation and grounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from pumer.api import active, unreduced
from pumer.lab.evaluate import NOT_NUMBERS, paired
from pumer.lab.tasks.base import Collator, Task, last_argmax
from pumer.lab.tasks.retrieval import ranking_scores
from pumer.lab.train.losses import distillation_loss, matching_loss, task_loss
from pumer.lab.train.watch import FirstFailure


@dataclass(frozen=True)
class Distillation:
    """A teacher and the weight of its loss.

    Args:
        teacher: an unreduced model, never trained; not called for batches with `teacher_logits`.
        collator: makes the batch's `teacher_inputs` where they differ from the student's, and knows
            the order of the teacher's labels.
        weight: of KL(teacher || student); the task's own loss has weight 1.
        temperature: of that divergence.
    """

    teacher: nn.Module
    collator: Collator | None = None
    weight: float = 1.0
    temperature: float = 1.0


class TaskTrainer(Trainer):
    """Fine-tune a model, reduced or not, on a task.

    Everything else is the Trainer's: resuming, mixed precision, gradient accumulation, DDP and FSDP
    through accelerate or torchrun, logging.

    Args:
        task: says what the labels are.
        distillation: a teacher to distil from, if there is one.
        grounding_weight: weight of the grounding loss, where the model returns one.
        itm_weight: weight of image-text matching, where the model has a head for it and the task
            ranks texts.

    A learned reducer's budget loss is added. Reducers that distil from themselves also add the loss
    of the unreduced model, which then teaches the reduced one.
    """

    def __init__(
        self,
        *args: Any,
        task: Task,
        distillation: Distillation | None = None,
        grounding_weight: float = 1.0,
        itm_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Losses are means over a batch, so the Trainer has to average accumulated ones.
        self.model_accepts_loss_kwargs = False
        self.task, self.distillation = task, distillation
        self.grounding_weight, self.itm_weight = grounding_weight, itm_weight
        self._parts: dict[str, list[Tensor]] = {}
        self.failure = FirstFailure()
        if distillation is not None:
            distillation.teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's loss, plus those of budget, distillation, grounding and matching where they
        are used."""
        labels = inputs.pop("labels")
        texts = inputs.pop("texts_per_image", 1)
        teacher_logits = inputs.pop("teacher_logits", None)
        teacher_inputs = inputs.pop("teacher_inputs", None)
        collator = getattr(self.data_collator, "student", self.data_collator)

        # The unreduced model's own logits, where a learned reducer distils from them.
        patch = active(self.model)
        learned = patch.reducer.traits.learned if patch is not None and model.training else None
        full_logits = None
        if patch is not None and learned:
            patch.progress = self.state.global_step / max(self.state.max_steps, 1)
            if learned.self_distils:
                with unreduced(self.model):
                    full_outputs = model(**paired(self.model, inputs, texts))
                full_logits = self._logits(full_outputs, labels, collator)

        outputs = model(**paired(self.model, inputs, texts))
        logits = self._logits(outputs, labels, collator)
        parts = {"task": task_loss(logits, labels, self.task.loss_kind)}
        if patch is not None and learned:
            budget_loss = patch.budget_loss()
            assert budget_loss is not None
            parts["budget"] = budget_loss
        if full_logits is not None:
            parts["whole"] = task_loss(full_logits, labels, self.task.loss_kind)
            parts["self_distill"] = distillation_loss(logits, full_logits.detach())
        if self.distillation is not None and model.training:
            if teacher_logits is None:
                teacher_logits = self._teacher_logits(
                    inputs if teacher_inputs is None else teacher_inputs, labels, texts
                )
            # For ranking over all texts of an image; the published code takes the softmax of one
            # score, which gives 0.
            parts["distill"] = self.distillation.weight * distillation_loss(
                logits, teacher_logits, self.distillation.temperature
            )
        if "grounding_loss" in outputs:
            parts["grounding"] = self.grounding_weight * outputs["grounding_loss"]
        if "itm_logits" in outputs:
            parts["itm"] = self.itm_weight * matching_loss(outputs["itm_logits"], labels)
        if model.training:
            self._note(parts, accuracy(logits, labels))
        loss = sum(parts.values(), torch.zeros((), device=labels.device))
        return (loss, {"logits": logits}) if return_outputs else loss

    def _teacher_logits(self, inputs: dict[str, Any], labels: Tensor, texts: int) -> Tensor:
        """The teacher's logits of a batch, in the order of the task's labels."""
        assert self.distillation is not None
        hidden = ("patch_labels", "texts_per_image")
        inputs = {name: value for name, value in inputs.items() if name not in hidden}
        teacher = self.distillation.teacher
        # Accelerate wraps only the student's forward in the mixed precision asked for.
        with torch.no_grad(), self.accelerator.autocast():
            outputs = teacher(**paired(teacher, inputs, texts))
        return self._logits(outputs, labels, self.distillation.collator)

    def _logits(self, outputs: Any, labels: Tensor, collator: Any) -> Tensor:
        """One row per example, in the order of the task's labels or of the texts to rank."""
        logits = outputs.logits
        if self.task.loss_kind == "rank":
            logits = ranking_scores(logits).reshape(len(labels), -1)
        return collator.in_task_order(logits) if isinstance(collator, Collator) else logits

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step; its loss is checked, see `watch.StopAtNaN`."""
        loss = super().training_step(*args, **kwargs)
        self.failure.note(loss, self.state.global_step + 1)
        return loss

    @staticmethod
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of an evaluation, in percent; raises ValueError for NaN outputs."""
        scores, labels = (
            torch.as_tensor(prediction.predictions),
            torch.as_tensor(prediction.label_ids),
        )
        if nan := int(scores.isnan().any(1).sum()):
            raise ValueError(NOT_NUMBERS.format(f"the outputs for {nan} of {len(scores)} examples"))
        return {"accuracy": accuracy(scores, labels).item()}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, logits and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"].detach(), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the mean of every part of the loss since the last entry."""
        if "loss" in logs:
            logs |= {
                name: round(torch.stack(values).mean().item(), 4)
                for name, values in self._parts.items()
            }
            self._parts = {}
        super().log(logs, *args, **kwargs)

    def _note(self, parts: dict[str, Tensor], right: Tensor) -> None:
        for name, value in {
            **{f"{name}_loss": part for name, part in parts.items()},
            "accuracy": right,
        }.items():
            self._parts.setdefault(name, []).append(value.detach())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean score of the most likely label in percent: 0 or 1 for class indices, the soft score for
    scores."""
    best = last_argmax(logits)
    if labels.ndim == 1:
        return 100 * (best == labels).float().mean()
    return 100 * labels.gather(1, best[:, None]).mean()
