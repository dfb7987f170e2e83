"""What training minimises. Shape suffixes: B batch, L labels, P patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def task_loss(logits_BL: Tensor, labels: Tensor, kind: Literal["soft", "class"]) -> Tensor:
    """Loss against the task's labels, in float32.

    "soft": binary cross-entropy with scores [B,L], mean over the batch, sum over the labels (ViLT's);
    "class": cross-entropy with class numbers [B].
    """
    logits = logits_BL.float()
    if kind == "class":
        return functional.cross_entropy(logits, labels)
    return functional.binary_cross_entropy_with_logits(logits, labels) * logits.shape[1]


def distillation_loss(student_BL: Tensor, teacher_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmax over labels, mean over the batch (Hinton et al., 2015; PuMer, section 4).

    Scaled by the squared temperature, so that its gradients keep their size.
    """
    student = functional.log_softmax(student_BL.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_BL.float() / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def grounding_loss(parts: Sequence[Tensor], labels_BP7: Tensor) -> Tensor:
    """Every patch says what it shows, where the middle of that is, and what the question has to do with it.

    Args:
        parts: logits [B,P,classes] of colour, shape, asked about, beside and above; then the way to the middle [B,P,2]
            in units of eight pixels.
        labels_BP7: int64, see `tasks.scenes.dense_labels`.
    """
    *logits, middle = (part.float() for part in parts)
    colour, shape, asked, across, down, beside, above = labels_BP7.unbind(-1)
    rare = torch.tensor([1.0, 4.0, 4.0], device=middle.device)  # few patches are asked about
    loss = functional.smooth_l1_loss(middle * (colour > 0)[..., None], torch.stack([across, down], -1) / 8)
    for scores, labels in zip(logits, (colour, shape, asked, beside, above), strict=True):
        weight = rare if scores.shape[-1] == len(rare) else None
        loss = loss + functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight)
    return loss
