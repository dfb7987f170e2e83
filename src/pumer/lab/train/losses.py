"""Training losses. Shape suffixes: B batch, K texts per image, L labels, P patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def task_loss(logits_BL: Tensor, labels: Tensor, loss_kind: str) -> Tensor:
    """Loss against the task's labels, in float32.

    "soft": binary cross-entropy with scores [B,L], mean over the batch, sum over the labels (as in
    ViLT). "class": cross-entropy with class indices [B]. "rank": cross-entropy over the K texts of
    an image; labels are the index of the matching one.

    >>> task_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), "class")
    tensor(0.1269)
    """
    logits = logits_BL.float()
    if loss_kind == "soft":
        return functional.binary_cross_entropy_with_logits(logits, labels) * logits.shape[1]
    return functional.cross_entropy(logits, labels)


def matching_loss(logits_N2: Tensor, own_B: Tensor) -> Tensor:
    """Cross-entropy of image-text matching over all N = B * K pairs, with each image's K texts in a
    row.

    Args:
        logits_N2: for no and yes.
        own_B: int64, index of the matching text of each image.
    """
    texts = len(logits_N2) // len(own_B)
    return functional.cross_entropy(logits_N2.float(), functional.one_hot(own_B, texts).flatten())


def distillation_loss(student_BL: Tensor, teacher_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmax over labels, mean over the batch (Hinton et al., 2015;
    PuMer, section 4).

    Scaled by the squared temperature, so that gradients keep their magnitude.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> distillation_loss(logits, logits)
    tensor(0.)
    """
    student = functional.log_softmax(student_BL.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_BL.float() / temperature, dim=-1)
    return (
        functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    )


def grounding_loss(parts: Sequence[Tensor], labels_BP7: Tensor) -> Tensor:
    """Classify what every patch shows and how the question refers to it, and regress the offset to
    the middle of the object.

    Args:
        parts: logits [B,P,classes] of colour, shape, asked about, beside and above; then the offset
            [B,P,2] in units of eight pixels.
        labels_BP7: int64, see `scenes.tasks.dense_labels`.
    """
    *logits, middle = (part.float() for part in parts)
    colour, shape, asked, across, down, beside, above = labels_BP7.unbind(-1)
    rare = torch.tensor(
        [1.0, 4.0, 4.0], device=middle.device
    )  # few patches are asked about: weigh them higher
    loss = functional.smooth_l1_loss(
        middle * (colour > 0)[..., None], torch.stack([across, down], -1) / 8
    )
    for scores, labels in zip(logits, (colour, shape, asked, beside, above), strict=True):
        weight = rare if scores.shape[-1] == len(rare) else None
        loss = loss + functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight)
    return loss
