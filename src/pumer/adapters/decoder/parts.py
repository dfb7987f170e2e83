"""Where the parts of a decoder are, by the names that transformers' models give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import Adapter, config_of
from pumer.adapters.decoder.recurrent import step_macs
from pumer.reducers.tokens import Grid

LANGUAGE = ("language_model", "text_model")
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
PROJECTOR = ("multi_modal_projector", "aligner", "mm_projector", "projector", "vision_projection")
LAYERS = ("layers", "layer", "blocks")
ATTENTION = ("self_attn", "attention", "attn")
DEFAULT_TEXT = 64
"""Text tokens of a prompt, where nothing else is said."""


class DecoderParts(Adapter):
    """The parts of a family's models; a family overrides what has another name."""

    num_prefix_tokens = 0

    def trunk(self, model: nn.Module) -> Any:
        """The model without its language-modelling head, where text and images meet."""
        return model.model if hasattr(model, "lm_head") else model

    def language(self, model: nn.Module) -> Any:
        """The decoder."""
        return named(self.trunk(model), LANGUAGE)

    def vision(self, model: nn.Module) -> Any:
        """The vision tower."""
        return named(self.trunk(model), VISION)

    def projector(self, model: nn.Module) -> nn.Module:
        """What takes the vision tower's features to the language model's width."""
        return named(self.trunk(model), PROJECTOR)

    def tower_attention(self, model: nn.Module) -> Any:
        """The attention of the layer of the vision tower that its features come from."""
        vision = self.vision(model)
        index = getattr(config_of(model), "vision_feature_layer", -1)
        return named(tower_layers(vision)[feature_depth(vision, index) - 1], ATTENTION)

    def last_attention(self, model: nn.Module) -> Any:
        """The attention of the vision tower's last layer; None where it is that of
        `tower_attention`."""
        return None

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        """The attention of the layers of the vision tower that see the whole image, by the layer's
        number from 1."""
        layers = tower_layers(self.vision(model))
        return {index + 1: named(layer, ATTENTION) for index, layer in enumerate(layers)}

    def has_class_token(self, model: nn.Module) -> bool:
        """Whether the vision tower has a [CLS] token."""
        return False

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(self.language(model).layers)

    def layer_attention(self, layer: nn.Module) -> Any:
        """The attention of a layer of the language model; None where it keeps a state in place of
        keys, or has neither."""
        module = next((getattr(layer, name) for name in ATTENTION if hasattr(layer, name)), None)
        return None if step_macs(module) else module

    def passes(self, model: nn.Module) -> list[int]:
        """How often a token goes through every layer."""
        return [1] * self.depth(model)

    def key_layers(self, model: nn.Module) -> list[int]:
        """The layer whose keys every layer reads: its own, where they are not shared."""
        return list(range(self.depth(model)))

    def patches_per_token(self, model: nn.Module) -> int:
        """How many patches of the vision tower become one token of the language model."""
        return 1

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        return DEFAULT_TEXT, rows * columns

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).vision_config
        side = side_length(vision.image_size) // side_length(vision.patch_size)
        side //= math.isqrt(self.patches_per_token(model))
        return side, side

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        return self.layer_attention_shape(model, 0)

    def layer_attention_shape(self, model: nn.Module, layer_index: int) -> tuple[int, int]:
        """(heads, channels of a head) of a layer, where they are not the same in all."""
        config = config_of(model).get_text_config()
        if getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[layer_index]
        heads = config.num_attention_heads
        channels = head_channels(self.layer_attention(self.layers(model)[layer_index]))
        return heads, channels or getattr(config, "head_dim", None) or config.hidden_size // heads

    def cache_channels(self, model: nn.Module) -> list[int]:
        """Numbers that the cache of every layer holds of one token; a state has none of them."""
        result = []
        for layer_index, key_layer in enumerate(self.key_layers(model)):
            attention = self.layer_attention(self.layers(model)[layer_index])
            if attention is None or key_layer != layer_index:
                result.append(0)
                continue
            heads, channels = self.layer_attention_shape(model, layer_index)
            result.append(2 * (heads // getattr(attention, "num_key_value_groups", 1)) * channels)
        return [held * times for held, times in zip(result, self.passes(model), strict=True)]


class SquareMerge(DecoderParts):
    """A square of patches becomes one token; `merge_side` is how its side is configured."""

    merge_side: ClassVar[str]

    def patches_per_token(self, model: nn.Module) -> int:
        return int(getattr(config_of(model), self.merge_side) ** 2)


def named(module: Any, names: Sequence[str]) -> Any:
    """The first part of a module with one of these names."""
    name = next((name for name in names if getattr(module, name, None) is not None), None)
    if name is None:
        raise ValueError(f"{type(module).__name__} has none of the parts {', '.join(names)}")
    return getattr(module, name)


def head_channels(attention: nn.Module | None) -> int | None:
    """Channels of one head of an attention; None where it does not say, or there is none."""
    return getattr(attention, "head_dim", None)


def side_length(size: Any) -> int:
    """A side's length, which some configurations give twice."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def tower_layers(tower: Any) -> nn.ModuleList:
    """The layers of a vision tower."""
    inner = tower
    for name in ("vision_model", "transformer", "model", "encoder"):
        inner = getattr(inner, name, inner)
    return named(inner, LAYERS)


def feature_depth(tower: Any, index: int | Sequence[int]) -> int:
    """How many layers of a vision tower make the hidden states of this index, or of the last of
    several."""
    depth = len(tower_layers(tower))
    return max(
        layer_index if layer_index >= 0 else depth + 1 + layer_index
        for layer_index in ([index] if isinstance(index, int) else index)
    )
