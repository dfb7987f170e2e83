"""transformers' Trainer with a task's loss, an optional teacher and an optional grounding loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from pumer.api import active, unreduced
from pumer.lab.evaluate import NOT_NUMBERS, paired
from pumer.lab.tasks.base import Collator, Task, last_argmax
from pumer.lab.train.losses import distillation_loss, matching_loss, task_loss
from pumer.lab.train.watch import FirstFailure


class TaskTrainer(Trainer):
    """Fine-tune a model, reduced or not, on a task.

    Everything else is the Trainer's: resuming, mixed precision, gradient accumulation, DDP and FSDP
    through accelerate or torchrun, logging.

    Args:
        task: says what the labels are.
        teacher: an unreduced model to distil from, never trained; not asked where batches hold its
            logits, `taught`.
        teacher_collator: that made the `teacher_inputs` of a batch, which else are the model's, and
            tells the order of the teacher's labels.
        distill_weight: of KL(teacher || student), next to 1 for the task's own loss.
        temperature: of that divergence.
        grounding_weight: of the grounding loss, where the model gives one.
        itm_weight: of image-text matching, where the model has a head for it and the task ranks
            texts.

    A learned reducer's price is added to the loss; where it asks for that, so is the loss of the
    whole model, which then teaches the reduced one.
    """

    def __init__(
        self,
        *args: Any,
        task: Task,
        teacher: nn.Module | None = None,
        teacher_collator: Collator | None = None,
        distill_weight: float = 1.0,
        temperature: float = 1.0,
        grounding_weight: float = 1.0,
        itm_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Losses are means of a batch: of several that are accumulated the Trainer has to take the
        # mean.
        self.model_accepts_loss_kwargs = False
        self.task, self.teacher, self.teacher_collator = task, teacher, teacher_collator
        self.distill_weight, self.temperature = distill_weight, temperature
        self.grounding_weight, self.itm_weight = grounding_weight, itm_weight
        self._parts: dict[str, list[Tensor]] = {}
        self.failure = FirstFailure()
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.pop("labels")
        texts = inputs.pop("texts_per_image", 1)
        taught, shown = inputs.pop("taught", None), inputs.pop("teacher_inputs", None)
        collator = getattr(self.data_collator, "student", self.data_collator)
        patch = active(self.model)
        full_logits = None
        if patch is not None and patch.reducer.traits.learned and model.training:
            patch.progress = self.state.global_step / max(self.state.max_steps, 1)
            if patch.reducer.traits.learned.self_distils:
                with unreduced(self.model):
                    full_logits = self._logits(
                        model(**paired(self.model, inputs, texts)), labels, collator
                    )
        outputs = model(**paired(self.model, inputs, texts))
        logits = self._logits(outputs, labels, collator)
        parts = {"task": task_loss(logits, labels, self.task.loss_kind)}
        if patch is not None and patch.reducer.traits.learned and model.training:
            price = patch.budget_loss()
            assert price is not None
            parts["budget"] = price
        if full_logits is not None:
            parts["whole"] = task_loss(full_logits, labels, self.task.loss_kind)
            parts["self_distill"] = distillation_loss(logits, full_logits.detach())
        if taught is None and self.teacher is not None and model.training:
            if shown is None:
                shown = {name: value for name, value in inputs.items() if name != "patch_labels"}
            shown.pop("texts_per_image", None)
            # Accelerate wraps only the student's forward in the mixed precision asked for.
            with torch.no_grad(), self.accelerator.autocast():
                answers = self.teacher(**paired(self.teacher, shown, texts))
            taught = self._logits(answers, labels, self.teacher_collator)
        if taught is not None and model.training:
            # Of ranked texts over all of an image's, where the published code has the softmax of a
            # single score: 0.
            parts["distill"] = self.distill_weight * distillation_loss(
                logits, taught, self.temperature
            )
        if "grounding_loss" in outputs:
            parts["grounding"] = self.grounding_weight * outputs["grounding_loss"]
        if "itm_logits" in outputs:
            parts["itm"] = self.itm_weight * matching_loss(outputs["itm_logits"], labels)
        if model.training:
            self._note(parts, accuracy(logits, labels))
        loss = sum(parts.values(), torch.zeros((), device=labels.device))
        return (loss, {"logits": logits}) if return_outputs else loss

    @staticmethod
    def _logits(outputs: Any, labels: Tensor, collator: Any) -> Tensor:
        """A row for each example, in the order of the task's labels or of the texts to rank."""
        logits = outputs.logits.reshape(len(labels), -1)  # texts to rank have one each
        return collator.in_task_order(logits) if isinstance(collator, Collator) else logits

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, whose loss is watched, see `watch.StopAtNaN`."""
        loss = super().training_step(*args, **kwargs)
        self.failure.note(loss, self.state.global_step + 1)
        return loss

    @staticmethod
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        """What the Trainer reports of an evaluation, in percent; raises ValueError for outputs that
        are NaN."""
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
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"].detach(), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the mean of every part of the loss since the last one."""
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
    """Mean score of the most likely label in percent: right or wrong for class numbers, the soft
    score for scores."""
    best = last_argmax(logits)
    if labels.ndim == 1:
        return 100 * (best == labels).float().mean()
    return 100 * labels.gather(1, best[:, None]).mean()
