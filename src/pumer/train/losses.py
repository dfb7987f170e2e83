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


def grounding_loss(logits: tuple[Tensor, Tensor, Tensor], labels_BP3: Tensor) -> Tensor:
    """Cross-entropy of every patch's colour and shape, and of whether the question is about it.

    Args:
        logits: colour [B,P,colours], shape [B,P,shapes], asked about [B,P].
        labels_BP3: int64, the same three as class numbers; the last is 0 or 1.
    """
    colour, shape, asked = (part.float() for part in logits)
    few = torch.tensor(4.0, device=asked.device)  # patches that are asked about are rare
    return (
        functional.cross_entropy(colour.flatten(0, 1), labels_BP3[..., 0].flatten())
        + functional.cross_entropy(shape.flatten(0, 1), labels_BP3[..., 1].flatten())
        + functional.binary_cross_entropy_with_logits(asked, labels_BP3[..., 2].float(), pos_weight=few)
    )
