"""Vision-language models for benchmarks: true architecture and width, random weights, fewer
layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from pumer._suggest import did_you_mean
from pumer.adapters import find

CROPS = 5
"""Crops of an image in families that cut it up, the small one of the whole included."""
_LLAMA = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def _llava(layers: int = 32, tower_layers: int = 24) -> LlavaConfig:
    vision = CLIPVisionConfig(**_CLIP, num_hidden_layers=tower_layers)
    text = LlamaConfig(**_LLAMA, num_hidden_layers=layers)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def _llava_next(layers: int = 32, tower_layers: int = 24) -> LlavaNextConfig:
    vision = CLIPVisionConfig(**_CLIP, num_hidden_layers=tower_layers)
    text = LlamaConfig(**_LLAMA, num_hidden_layers=layers)
    return LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=32000)


def _qwen(layers: int = 28, tower_layers: int = 32) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": tower_layers,
        "hidden_size": 1280,
        "out_hidden_size": 3584,
        "intermediate_size": 3420,
        "num_heads": 16,
        # Every eighth block attends to the whole image, the others to windows.
        "fullatt_block_indexes": list(range(7, tower_layers, 8)) or [tower_layers - 1],
    }
    text = _QWEN | {"vocab_size": 152064, "num_hidden_layers": layers, "rope_parameters": rope}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, tie_word_embeddings=False
    )


def _internvl(layers: int = 28, tower_layers: int = 24) -> InternVLConfig:
    vision = InternVLVisionConfig(num_hidden_layers=tower_layers, attention_bias=True)
    text = Qwen2Config(**_QWEN, vocab_size=151674, num_hidden_layers=layers)
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=151667, tie_word_embeddings=False
    )


def _tiny(layers: int = 4, tower_layers: int = 2) -> LlavaConfig:
    vision = CLIPVisionConfig(
        **_TINY, num_hidden_layers=tower_layers, image_size=96, patch_size=8, projection_dim=64
    )
    text = LlamaConfig(**_TINY, num_key_value_heads=2, vocab_size=200, num_hidden_layers=layers)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=199)


SHAPES: dict[str, Callable[..., Any]] = {
    "llava-1.5-7b-shape": _llava,
    "llava-next-7b-shape": _llava_next,
    "qwen2.5-vl-7b-shape": _qwen,
    "internvl3-8b-shape": _internvl,
    "llava-tiny-shape": _tiny,
}
"""LLaVA 1.5 (576 image tokens), LLaVA-NeXT (2,880 of five crops), Qwen2.5-VL (576 of 672 pixels),
InternVL 3 (1,280 of five crops), and one to try things out with, of which no time means
anything."""


def configure(
    name: str, layers: int | None = None, tower_layers: int | None = None
) -> PreTrainedConfig:
    """The configuration of a shape.

    Args:
        name: of the shape.
        layers: of the language model; all if not given.
        tower_layers: of the vision tower; all if not given.

    Raises:
        ValueError: for unknown names, listing the known ones, and for too few layers.
    """
    if name not in SHAPES:
        raise ValueError(
            f"no shape is named {name!r}.{did_you_mean(name, SHAPES)} There are {', '.join(SHAPES)}"
        )
    depths = {"layers": layers, "tower_layers": tower_layers}
    chosen_depths = {key: depth for key, depth in depths.items() if depth is not None}
    if any(depth < 2 for depth in chosen_depths.values()):
        raise ValueError(
            "a language model and a vision tower have at least 2 layers here: give layers of 2 or "
            "more"
        )
    config: PreTrainedConfig = SHAPES[name](**chosen_depths)
    return config


def build(
    config: PreTrainedConfig, device: str, dtype: torch.dtype, attention: str, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights in eval mode; raises ValueError if the attention kernel is not
    available."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        try:
            net = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        except ImportError as error:
            raise ValueError(
                f"attention {attention!r} cannot be had here, give sdpa: {error}"
            ) from error
    eval_net: PreTrainedModel = net.eval()
    return eval_net


def default_reducers(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One reducer before the language model, one in an early layer, and PuMer in three layers."""
    depth = config.get_text_config().num_hidden_layers
    at = sorted({min(depth * layer // 12, depth - 2) for layer in (2, 5, 8)})
    zip_ = {"reducer": "visionzip", "keep": 128}
    if config.model_type.startswith("qwen"):  # no [CLS]
        zip_["saliency"] = "received"
    return [
        zip_,
        {"reducer": "fastv", "keep": 0.5, "layer": min(2, depth - 1)},
        {"reducer": "pumer", "prune": 0.1, "merge": 0.3, "merge_text": 0.0, "layers": at},
    ]


def inputs(
    model: PreTrainedModel, batch: int = 1, text: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts as the processor makes them: half of the text, an image, the other half.

    Args:
        model: the inputs are for.
        batch: number of prompts, all of one length.
        text: text tokens of each, without those that a family puts around and between the parts of
            an image.
        seed: of the data.

    Raises:
        ValueError: for fewer than one prompt or two text tokens, and for families without a shape.
    """
    if batch < 1 or text < 2:
        raise ValueError(f"{batch} prompts with {text} text tokens: give 1 or more, 2 or more each")
    generator = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    rows, columns = find(model).default_grid(model)
    image, around = config.image_token_id, (0, 0)
    batch_inputs: dict[str, Tensor] = {}
    if config.model_type == "qwen2_5_vl":
        patches = [side * vision.spatial_merge_size for side in (rows, columns)]
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        batch_inputs["pixel_values"] = torch.randn(
            batch * patches[0] * patches[1], values, generator=generator
        )
        batch_inputs["image_grid_thw"] = torch.tensor([[1, *patches]] * batch)
        placeholders, around = rows * columns, (1, 1)
    elif config.model_type == "internvl":
        batch_inputs["pixel_values"] = torch.randn(
            batch * CROPS, 3, *vision.image_size, generator=generator
        )
        placeholders, around = CROPS * rows * columns, (1, 1)
    elif config.model_type == "llava_next":
        side = vision.image_size
        batch_inputs["pixel_values"] = torch.randn(batch, CROPS, 3, side, side, generator=generator)
        batch_inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * batch)
        newlines = 2 * rows  # one at the end of every row of crops
        placeholders = rows * columns + 2 * rows * 2 * columns + newlines
    elif config.model_type == "llava":
        side = vision.image_size
        batch_inputs["pixel_values"] = torch.randn(batch, 3, side, side, generator=generator)
        placeholders = rows * columns
    else:
        raise ValueError(
            f"no prompts are known for {config.model_type}; there are shapes {', '.join(SHAPES)}"
        )
    # Special tokens have ids next to the placeholder's.
    words = torch.randint(3, image - 16, (batch, text + sum(around)), generator=generator)
    first = text // 2 + around[0]
    ids = torch.cat(
        [words[:, :first], torch.full((batch, placeholders), image), words[:, first:]], 1
    )
    batch_inputs["pixel_values"] = batch_inputs["pixel_values"].to(model.dtype)
    batch_inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "qwen2_5_vl":
        batch_inputs["mm_token_type_ids"] = (ids == image).int()
    return {name: tensor.to(model.device) for name, tensor in batch_inputs.items()}
