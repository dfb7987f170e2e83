"""What training minimises. Shape suffixes: B batch, L labels, P patches."""

from __future__ import annotations

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


def grounding_loss(colour: Tensor, shape: Tensor, asked: Tensor, middle: Tensor, labels_BP5: Tensor) -> Tensor:
    """Every patch says what it shows, where the middle of that is, and whether the question is about it.

    Args:
        colour, shape, asked: logits [B,P,classes]; middle: [B,P,2] in units of eight pixels.
        labels_BP5: int64, class of the colour and of the shape, whether asked about (1, or 2 for the second object of a
            comparison), and the way to the middle in pixels.
    """
    colours, shapes, about, way = labels_BP5.split([1, 1, 1, 2], dim=-1)
    rare = torch.tensor([1.0, 4.0, 4.0], device=asked.device)  # few patches are asked about
    return (
        functional.cross_entropy(colour.float().flatten(0, 1), colours.flatten())
        + functional.cross_entropy(shape.float().flatten(0, 1), shapes.flatten())
        + functional.cross_entropy(asked.float().flatten(0, 1), about.flatten(), rare)
        + functional.smooth_l1_loss(middle.float() * (colours > 0), way / 8)
    )
