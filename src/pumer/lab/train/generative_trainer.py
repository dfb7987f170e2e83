"""Trainer for models that generate their answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from pumer.lab.evaluate import NOT_NUMBERS
from pumer.lab.tasks.prompts import IGNORED
from pumer.lab.train.losses import distillation_loss
from pumer.lab.train.trainer import TaskTrainer


class GenerativeTrainer(TaskTrainer):
    """Train a model, reduced or not, on the tokens of the answers.

    With a teacher, its distribution over each answer token is distilled. Accuracy is the share of
    answers with every token right given the ones before, which are those that greedy decoding would
    produce.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss on answer tokens, plus distillation and grounding where they are
        used."""
        outputs = model(**inputs)
        parts = {"task": outputs.loss}
        labels = inputs["labels"]
        if self.distillation is not None and model.training:
            shown = {name: value for name, value in inputs.items() if name != "patch_labels"}
            # Accelerate wraps only the student's forward in the mixed precision asked for.
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.distillation.teacher(**shown).logits
            learned = labels[:, 1:] != IGNORED
            student_logits, teacher_logits = (
                logits[:, :-1][learned] for logits in (outputs.logits, teacher_logits)
            )
            parts["distill"] = self.distillation.weight * distillation_loss(
                student_logits, teacher_logits, self.distillation.temperature
            )
        if "grounding_loss" in outputs:
            parts["grounding"] = self.grounding_weight * outputs["grounding_loss"]
        if not model.training and outputs.logits.isnan().any():
            raise ValueError(NOT_NUMBERS.format("the outputs for a batch of prompts"))
        right = answered(outputs.logits, labels)
        if model.training:
            self._note(parts, 100 * right.mean())
        loss = sum(parts.values(), torch.zeros((), device=labels.device))
        return (loss, {"right": right}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and whether each answer is right."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        # The Trainer only gathers outputs that come with labels, and prompts of different batches
        # have different lengths.
        return loss.detach(), outputs["right"], torch.ones_like(outputs["right"])

    @staticmethod
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        """The share of right answers, in percent."""
        return {"accuracy": 100 * torch.as_tensor(prediction.predictions).mean().item()}


def answered(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """1 where the most likely tokens are exactly the answer, else 0: float32 [B]."""
    wanted = labels_BS[:, 1:]
    return ((logits_BSV[:, :-1].argmax(-1) == wanted) | (wanted == IGNORED)).all(1).float()
