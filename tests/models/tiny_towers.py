"""Tiny random-weight vision towers of every class that is reduced by itself, and their images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAYERS = 4
SIDE, PATCH = 48, 8
PATCHES = (SIDE // PATCH) ** 2
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIGLIP2 = {name: value for name, value in VISION.items() if name != "image_size"} | {
    "num_patches": PATCHES
}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}
BOTH = {"text_config": TEXT, "vision_config": VISION}
BOTH2 = {"text_config": TEXT, "vision_config": SIGLIP2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIPModel": ("CLIPConfig", BOTH | {"projection_dim": 16}),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VISION | {"projection_dim": 16}),
    "CLIPForImageClassification": ("CLIPConfig", BOTH | {"num_labels": 5}),
    "SiglipModel": ("SiglipConfig", BOTH),
    "SiglipVisionModel": ("SiglipVisionConfig", VISION),
    "SiglipForImageClassification": ("SiglipConfig", BOTH | {"num_labels": 5}),
    "Siglip2Model": ("Siglip2Config", BOTH2),
    "Siglip2VisionModel": ("Siglip2VisionConfig", SIGLIP2),
    "Siglip2ForImageClassification": ("Siglip2Config", BOTH2 | {"num_labels": 5}),
    "ViTModel": ("ViTConfig", VISION),
    "ViTForImageClassification": ("ViTConfig", VISION | {"num_labels": 5}),
    "Dinov2Model": ("Dinov2Config", DINO),
    "Dinov2ForImageClassification": ("Dinov2Config", DINO | {"num_labels": 5}),
}
GRIDS = ((6, 6), (3, 7), (8, 4))
"""Rows and columns of the images of SigLIP 2, whose rows are padded to `PATCHES`."""


def model(name: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    config, settings = CONFIGS[name]
    built = getattr(transformers, name)(getattr(transformers, config)(**(settings | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3, generator=generator)
    built.set_attn_implementation(attention)
    return built.eval()


def batch(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Images for a model, and texts where it has a text tower."""
    generator = torch.Generator().manual_seed(3)
    if name.startswith("Siglip2"):
        mask = torch.zeros(rows, PATCHES, dtype=torch.long)
        for row, (height, width) in enumerate(GRIDS[:rows]):
            mask[row, : height * width] = 1
        pixels = torch.randn(rows, PATCHES, 3 * PATCH**2, generator=generator) * mask[..., None]
        inputs = {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor(GRIDS[:rows]),
        }
    else:
        inputs = {"pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator)}
    if name in ("CLIPModel", "SiglipModel", "Siglip2Model"):
        inputs["input_ids"] = torch.randint(3, 50, (2, 16), generator=generator)
    return inputs


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One image of a batch, without padding, and all its texts."""
    one = {
        name: value if name == "input_ids" else value[row : row + 1]
        for name, value in inputs.items()
    }
    if "pixel_attention_mask" in one:
        length = int(one["pixel_attention_mask"].sum())
        one["pixel_values"] = one["pixel_values"][:, :length]
        one["pixel_attention_mask"] = one["pixel_attention_mask"][:, :length]
    return one


def answer(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """What it says of every image [rows,...]: similarities with texts, logits, or what is
    pooled."""
    with torch.no_grad():
        output = model(**inputs, **more)
    names = ("logits_per_image", "logits", "image_embeds", "pooler_output")
    return next(output[name] for name in names if output.get(name) is not None)


def vision(model: nn.Module) -> Any:
    """The tower of a model."""
    names = ("vision_model", "vit", "dinov2")
    return next((getattr(model, name) for name in names if hasattr(model, name)), model)
