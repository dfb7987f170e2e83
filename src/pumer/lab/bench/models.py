"""Models for benchmarks with true architecture and random weights, and inputs as the processor
makes them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    BridgeTowerConfig,
    PreTrainedModel,
    ViltConfig,
    ViltForQuestionAnswering,
)

from pumer._suggest import did_you_mean
from pumer.models.bridgetower import BridgeTowerForQuestionAnswering
from pumer.models.meter import MeterConfig, MeterForQuestionAnswering
from pumer.models.sizes import longest_text, text_of, vision_of

Config: TypeAlias = ViltConfig | MeterConfig | BridgeTowerConfig
CONFIGS: dict[str, Config] = {
    "vilt-b32": ViltConfig(num_labels=3129),
    "vilt-tiny": ViltConfig(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=96,
        patch_size=16,
        vocab_size=100,
        num_labels=10,
    ),
    "meter-base": MeterConfig(num_labels=3129),
    "meter-tiny": MeterConfig(
        text_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 100,
            "max_position_embeddings": 42,
            "type_vocab_size": 1,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 11,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 96,
            "patch_size": 8,
        },
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
    ),
    "bridgetower-base": BridgeTowerConfig(num_labels=3129),
    "bridgetower-tiny": BridgeTowerConfig(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "vocab_size": 100,
            "max_position_embeddings": 42,
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 8,
            "image_size": 96,
            "patch_size": 8,
        },
        hidden_size=64,
        num_attention_heads=4,
        num_labels=10,
    ),
}
"""ViLT-B/32 and METER-CLIP16-RoBERTa at 384 pixels, BridgeTower-base at 288, for VQAv2; and of each
a model to try things out with, of which no time means anything."""
_REDUCERS = {
    "vilt": ("vilt-vqav2", "vilt-vqav2-even"),
    "meter": ("meter-vqav2", "meter-vqav2-tower", "meter-vqav2-even"),
    "bridgetower": ("meter-vqav2",),  # nothing was published for it
}
_CLASSES = {
    "vilt": ViltForQuestionAnswering,
    "meter": MeterForQuestionAnswering,
    "bridgetower": BridgeTowerForQuestionAnswering,
}


def build(name: str = "vilt-b32", seed: int = 0) -> PreTrainedModel:
    """A model by name with random weights in eval mode; raises ValueError listing the known
    names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(name)
        return _CLASSES[config.model_type](config).eval()


def image_size(name: str) -> int:
    """Side in pixels of the images a model is configured for; raises ValueError listing the known
    names."""
    return vision_of(_config(name)).image_size


def default_reducers(name: str) -> tuple[str, ...]:
    """The presets of a model; raises ValueError listing the known names."""
    return _REDUCERS[_config(name).model_type]


def stock_note(name: str) -> str:
    """What is measured as stock if transformers lacks the model; raises ValueError listing the
    known names."""
    return (
        "our own METER, unreduced: transformers has none"
        if isinstance(_config(name), MeterConfig)
        else ""
    )


def _config(name: str) -> Config:
    if name not in CONFIGS:
        raise ValueError(
            f"no model to measure is named {name!r}.{did_you_mean(name, CONFIGS)} There are "
            f"{', '.join(CONFIGS)}; `pumer bench llm` has decoders, `pumer bench model` takes a "
            "saved model"
        )
    return CONFIGS[name]


def inputs(
    model: PreTrainedModel,
    batch: int = 8,
    size: int | None = None,
    text: int = 40,
    real: tuple[int, int] = (8, 16),
    seed: int = 0,
    busier: bool = False,
) -> dict[str, Tensor]:
    """A batch as the model's processor makes it, for square images and questions padded to one
    length.

    Args:
        model: the inputs are for.
        batch: number of examples.
        size: side of the images in pixels; the configured one if not given.
        text: text tokens, padding included.
        real: fewest and most real tokens; a batch of two or more has one text of each.
        seed: of the data.
        busier: each image is busier than the one before it, in place of noise throughout.

    Raises:
        ValueError: for lengths that do not fit each other or the model.
    """
    config, vision, words = model.config, vision_of(model.config), text_of(model.config)
    longest = longest_text(config)
    size = vision.image_size if size is None else size
    few, many = real
    if not 1 <= few <= many <= text <= longest:
        raise ValueError(
            f"{few} to {many} real tokens padded to {text}: give 1 <= fewest <= most <= padded "
            f"length <= {longest}"
        )
    if batch < 1 or size < vision.patch_size:
        raise ValueError(
            f"{batch} images of {size} px: give one or more, of {vision.patch_size} px or more"
        )
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(few, many + 1, (batch,), generator=generator)
    lengths[-1], lengths[0] = few, many
    mask = (torch.arange(text) < lengths[:, None]).long()
    padding = words.pad_token_id or 0
    ids = torch.randint(padding + 1, words.vocab_size, (batch, text), generator=generator)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    if busier:
        # Of each, the first pixels, enlarged: from 2 x 2 of them to 24 x 24.
        for row, side in enumerate(torch.linspace(2, min(24, size), batch).int().tolist()):
            pixels[row] = nn.functional.interpolate(
                pixels[row, None, :, :side, :side], size=(size, size), mode="bicubic"
            )[0]
    batch_inputs = {
        "input_ids": torch.where(mask.bool(), ids, padding),
        "attention_mask": mask,
        "pixel_values": pixels.to(model.dtype),
        "pixel_mask": torch.ones(batch, size, size, dtype=torch.long),
    }
    if config.model_type == "vilt":  # RoBERTa's tokenizer gives none
        batch_inputs["token_type_ids"] = torch.zeros_like(ids)
    return {name: tensor.to(model.device) for name, tensor in batch_inputs.items()}
