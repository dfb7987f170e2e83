"""Tiny random-weight models of every ViLT class, and padded batches of texts and pictures of several sizes for them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers import ViltConfig
from transformers.models.vilt import modeling_vilt

from pumer.models.vilt.entailment import ViltForVisualEntailment

LAYERS = 4
PATCH = 16
TEXTS = (9, 4, 7, 5)
"""Real text tokens of the rows of a batch."""
PICTURES = ((96, 64), (48, 128), (80, 80), (16, 112))
"""Height and width of the pictures of a batch, in pixels; the batch is as high and as wide as the largest."""

POOLED = (
    "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification",
    "ViltForImageAndTextRetrieval",
    "ViltForVisualEntailment",
)
PER_TOKEN = ("ViltModel", "ViltForMaskedLM", "ViltForTokenClassification")
CLASSES = POOLED + PER_TOKEN


def config(**changes: object) -> ViltConfig:
    """The configuration of a tiny model."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
        "image_size": 96,
        "patch_size": PATCH,
        "max_position_embeddings": 20,
    }
    return ViltConfig(**(settings | changes))


def model(kind: str = "ViltForQuestionAnswering", **changes: object) -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    if kind == "ViltForImagesAndTextClassification":
        changes = {"num_images": 2, "modality_type_vocab_size": 3, **changes}
    if kind == "ViltForQuestionAnswering":
        changes = {"num_labels": 7, **changes}
    made = (ViltForVisualEntailment if kind == "ViltForVisualEntailment" else getattr(modeling_vilt, kind))(
        config(**changes)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return made.eval()


def batch(kind: str = "ViltForQuestionAnswering", padding: int = 3, rows: int = 4) -> dict[str, Tensor]:
    """Inputs with padded texts and pictures.

    Args:
        kind: the model class; that of two pictures gets two.
        padding: text tokens of padding behind the longest text.
        rows: number of samples, at most four.
    """
    generator = torch.Generator().manual_seed(2)
    texts, pictures = TEXTS[:rows], PICTURES[:rows]
    ids = torch.randint(1, 50, (rows, max(texts) + padding), generator=generator)
    attention_mask = torch.zeros_like(ids)
    height, width = (max(sides) for sides in zip(*pictures, strict=True))
    images = 2 if kind == "ViltForImagesAndTextClassification" else 1
    pixels = torch.zeros(rows, images, 3, height, width)
    pixel_mask = torch.zeros(rows, images, height, width, dtype=torch.long)
    for row in range(rows):
        attention_mask[row, : texts[row]] = 1
        for image in range(images):
            high, wide = pictures[row - image]
            pixels[row, image, :, :high, :wide] = torch.randn(3, high, wide, generator=generator)
            pixel_mask[row, image, :high, :wide] = 1
    if images == 1:
        pixels, pixel_mask = pixels[:, 0], pixel_mask[:, 0]
    return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels, "pixel_mask": pixel_mask}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch without any padding (of two pictures: none that both have)."""
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    length = int(one["attention_mask"].sum())
    seen = one["pixel_mask"].flatten(0, -3).any(0)
    high, wide = int(seen.any(1).sum()), int(seen.any(0).sum())
    return {
        "input_ids": one["input_ids"][:, :length],
        "attention_mask": one["attention_mask"][:, :length],
        "pixel_values": one["pixel_values"][..., :high, :wide],
        "pixel_mask": one["pixel_mask"][..., :high, :wide],
    }


def answer(output: object) -> Tensor:
    """What a model is asked for: its logits, or the pooled state of one without a head."""
    return output.logits if "logits" in output else output.pooler_output


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The answer of a model, without gradient."""
    with torch.no_grad():
        return answer(model(**inputs))


class Evil:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)
