"""Tiny random-weight models of every class, and padded batches of texts and pictures for them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers import BridgeTowerConfig, ViltConfig
from transformers.models.bridgetower import modeling_bridgetower
from transformers.models.vilt import modeling_vilt

from pumer.models import bridgetower, meter
from pumer.models.vilt.entailment import ViltForVisualEntailment

LAYERS = 4
"""Layers that a reducer can act in: ViLT's blocks, METER's fusion layers, BridgeTower's cross-modal
ones."""
TOWER = 3
"""Layers of METER's vision tower, and of BridgeTower's below the first bridge."""
PATCH = 16
TEXTS = (9, 4, 7, 5)
"""Real text tokens of the rows of a batch."""
PICTURES = ((96, 64), (48, 128), (80, 80), (16, 112))
"""Height and width of the pictures of a batch, in pixels; the batch is as high and as wide as the
largest."""

POOLED = (
    "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification",
    "ViltForImageAndTextRetrieval",
    "ViltForVisualEntailment",
)
PER_TOKEN = ("ViltModel", "ViltForMaskedLM", "ViltForTokenClassification")
METER = (
    "MeterForQuestionAnswering",
    "MeterForImagesAndTextClassification",
    "MeterForImageAndTextRetrieval",
    "MeterForVisualEntailment",
    "MeterModel",
    "MeterForMaskedLM",
)
BRIDGETOWER = (
    "BridgeTowerForQuestionAnswering",
    "BridgeTowerForImagesAndTextClassification",
    "BridgeTowerForImageAndTextRetrieval",
    "BridgeTowerForVisualEntailment",
    "BridgeTowerModel",
    "BridgeTowerForMaskedLM",
    "BridgeTowerForContrastiveLearning",
)
TWO_STREAMS = METER + BRIDGETOWER
"""Classes whose pictures have one size, and whose norms come last."""
CLASSES = POOLED + PER_TOKEN + TWO_STREAMS
FAMILIES = {
    "ViLT": "ViltForQuestionAnswering",
    "METER": "MeterForQuestionAnswering",
    "BridgeTower": "BridgeTowerForQuestionAnswering",
}
"""A class of every family."""


def config(**changes: object) -> ViltConfig:
    """The configuration of a tiny ViLT."""
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


def meter_config(**changes: object) -> meter.MeterConfig:
    """The configuration of a tiny METER, whose parts all have widths of their own."""
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 50,
        "max_position_embeddings": 22,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "hidden_size": 48,
        "num_hidden_layers": TOWER,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "image_size": 96,
        "patch_size": PATCH,
    }
    settings = {
        "text_config": text,
        "vision_config": vision,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return meter.MeterConfig(**(settings | changes))


def bridgetower_config(**changes: object) -> BridgeTowerConfig:
    """The configuration of a tiny BridgeTower; its image tower has a width of its own."""
    depth = TOWER + LAYERS - 1
    text = {
        "hidden_size": 32,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
        "max_position_embeddings": 22,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "hidden_size": 128,
        "num_hidden_layers": depth,
        "image_size": 96,
        "patch_size": PATCH,
    }
    settings = {
        "text_config": text,
        "vision_config": vision,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    changes = dict(changes)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if name in changes:  # of cross-modal layers too
            text[name] = changes.pop(name)
    return BridgeTowerConfig(**(settings | changes))


def model(kind: str = "ViltForQuestionAnswering", **changes: object) -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    if kind.endswith("ForImagesAndTextClassification"):
        changes = {"num_images": 2, **changes}
        if kind not in BRIDGETOWER:
            changes = {"modality_type_vocab_size": 3, **changes}
    if kind.endswith("ForQuestionAnswering"):
        changes = {"num_labels": 7, **changes}
    if kind in METER:
        made = getattr(meter, kind)(meter_config(**changes))
    elif kind in BRIDGETOWER:
        if kind == "BridgeTowerForContrastiveLearning":  # which needs towers of one width
            text = bridgetower_config().text_config.to_dict() | {"hidden_size": 64}
            vision = bridgetower_config().vision_config.to_dict() | {"hidden_size": 64}
            changes = {
                "hidden_size": 64,
                "text_config": text,
                "vision_config": vision,
                "contrastive_hidden_size": 16,
                "logit_scale_init_value": 2.6,
                **changes,
            }
        module = bridgetower if hasattr(bridgetower, kind) else modeling_bridgetower
        made = getattr(module, kind)(bridgetower_config(**changes))
    elif kind == "ViltForVisualEntailment":
        made = ViltForVisualEntailment(config(**changes))
    else:
        made = getattr(modeling_vilt, kind)(config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2, generator=generator)
        for part in made.modules():
            # Where norms that come last shrink, all tokens soon are the same.
            if kind in TWO_STREAMS and isinstance(part, nn.LayerNorm):
                part.weight += 1
    return made.eval()


def batch(
    kind: str = "ViltForQuestionAnswering",
    padding: int = 3,
    rows: int = 4,
    size: tuple[int, int] = (96, 96),
) -> dict[str, Tensor]:
    """Inputs with padded texts and, for ViLT, padded pictures.

    Args:
        kind: the model class; that of two pictures gets two.
        padding: text tokens of padding behind the longest text.
        rows: number of samples, at most four.
        size: height and width of METER's and BridgeTower's pictures in pixels.
    """
    generator = torch.Generator().manual_seed(2)
    texts, pictures = TEXTS[:rows], (size,) * rows if kind in TWO_STREAMS else PICTURES[:rows]
    ids = torch.randint(1, 50, (rows, max(texts) + padding), generator=generator)
    attention_mask = torch.zeros_like(ids)
    height, width = (max(sides) for sides in zip(*pictures, strict=True))
    images = 2 if kind.endswith("ForImagesAndTextClassification") else 1
    pixels = torch.zeros(rows, images, 3, height, width)
    pixel_mask = torch.zeros(rows, images, height, width, dtype=torch.long)
    for row in range(rows):
        attention_mask[row, : texts[row]] = 1
        for image in range(images):
            high, wide = pictures[row - image]
            pixels[row, image, :, :high, :wide] = torch.randn(3, high, wide, generator=generator)
            pixel_mask[row, image, :high, :wide] = 1
    if kind in TWO_STREAMS:  # RoBERTa counts positions by its padding token, 1
        ids = torch.where(attention_mask.bool(), ids.clamp_min(2), 1)
    if images == 1:
        pixels, pixel_mask = pixels[:, 0], pixel_mask[:, 0]
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": pixels,
        "pixel_mask": pixel_mask,
    }


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
    if "cross_embeds" in output:
        return output.logits.flatten(1)
    return output.logits if "logits" in output else output.pooler_output


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The answer of a model, without gradient."""
    with torch.no_grad():
        return answer(model(**inputs))


class Evil:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)
