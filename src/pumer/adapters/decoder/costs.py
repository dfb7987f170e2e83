"""What a decoder costs up to the first token of its answer, counted from its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from pumer.adapters.base import config_of
from pumer.adapters.decoder.parts import (
    DecoderParts,
    tower_layers,
)
from pumer.adapters.decoder.recurrent import state_macs
from pumer.adapters.macs import head_macs, linear_weights
from pumer.adapters.tower import blocks
from pumer.reducers.tokens import Encoder

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""How configurations call the number of experts that a token goes through."""


class DecoderCosts(DecoderParts):
    """Multiply-accumulates of every part."""

    decodes: ClassVar[bool] = True
    """Whether the layers that are reduced also write the answer, from their own cache."""

    def cached_tokens(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]]
    ) -> list[int] | None:
        """Tokens in every layer's cache after a prompt of these lengths; None where they are those
        of the layer."""
        return None

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        """Tokens leave after a layer, whatever `after_layer` says; attention is counted over all
        pairs of tokens, states and short convolutions token by token, and of the experts of a layer
        those that one token goes through."""
        top_k = experts_per_token(config_of(model).get_text_config())
        result = []
        for index, (layer, pair) in enumerate(zip(self.layers(model), lengths[:-1], strict=True)):
            count, attention = sum(pair), self.layer_attention(layer)
            if attention is not None:
                heads, channels = self.layer_attention_shape(model, index)
                projections, pairs = linear_weights(attention), 2 * count**2 * heads * channels
            else:
                mixers = [part for part in layer.children() if state_macs(part)]
                projections, pairs = sum(map(linear_weights, mixers)), 0
            others = linear_weights(layer) - projections + expert_weights(layer, top_k)
            result.append((count * (projections + state_macs(layer)) + pairs, count * others))
        passes = zip(result, self.passes(model), strict=True)
        return [(times * attention, times * mlp) for (attention, mlp), times in passes]

    def head_macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of one token's way to the vocabulary."""
        return head_macs(model, self.trunk(model))

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Costs up to the first token of the answer: of the head, that token's alone."""
        _, image = entry or lengths[0]
        layers = self.layer_macs(model, lengths)
        vision, projection = self.vision_macs(model, image, tower)
        return {
            "embedding": 0,
            "vision tower": vision,
            "projection": projection,
            "attention": sum(attention for attention, _ in layers),
            "mlp": sum(mlp for _, mlp in layers),
            "head": self.head_macs(model),
        }

    def tower_entry(self, model: nn.Module, image: int) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        crops = max(1, round(image / (rows * columns)))
        return crops, image // crops + int(self.has_class_token(model))

    def feature_depth(self, model: nn.Module) -> int:
        """How many layers of the vision tower make its features."""
        raise NotImplementedError

    def tower_acts(self, model: nn.Module) -> tuple[int, ...]:
        """The layers of the vision tower in which tokens can be merged, from 0."""
        raise NotImplementedError

    def tower_keys(self, model: nn.Module, layer_index: int, length: int) -> int:
        """How many of `length` tokens each attends to in a layer of the vision tower."""
        return length

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """(layers, channels, heads) of the vision tower."""
        config = config_of(model).vision_config
        depth = getattr(config, "num_hidden_layers", None) or config.depth
        width = getattr(config, "embed_dim", None) or config.hidden_size
        heads = getattr(config, "num_attention_heads", None) or config.num_heads
        return depth, width, heads

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Multiply-accumulates of the vision tower, and of the projector, for an image of so many
        tokens.

        Every weight of theirs meets every patch; attention is within crops of the usual size.
        `tower` is as in `macs`: what is merged in a layer of the tower is spared its MLP and all
        that comes after.
        """
        vision, projector = self.vision(model), self.projector(model)
        crops, units = self.tower_entry(model, image)
        prefix, unit = int(self.has_class_token(model)), self.patches_per_token(model)

        def patches(units: int) -> int:
            return prefix + (units - prefix) * unit

        inside = set(projector.modules())
        weights = sum(
            part.weight.numel()
            for part in vision.modules()
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)) and part not in inside
        )
        depth, width, _ = self.tower_shape(model)
        crop_length, spared = patches(units), 0
        keys = [self.tower_keys(model, layer_index, crop_length) for layer_index in range(depth)]
        pairs = 2 * crop_length * sum(keys) * width
        if len(set(tower)) > 1:
            acts, run = self.tower_acts(model), self.feature_depth(model)
            for layer_index, layer in enumerate(tower_layers(vision)):
                act_index = sum(act < layer_index for act in acts)
                before = patches(tower[act_index])
                after = patches(tower[act_index + 1]) if layer_index in acts else before
                # Layers behind those that the features come from are run by the stock model alone.
                lengths = (before, after) if layer_index < run else (0, 0)
                full = blocks.layer_macs(layer, crop_length, crop_length, keys[layer_index])
                num_keys = self.tower_keys(model, layer_index, lengths[0])
                spared += sum(full) - sum(blocks.layer_macs(layer, *lengths, num_keys))
        return crops * (crop_length * weights + pairs - spared), image * linear_weights(projector)

    def encoder_facts(
        self, model: nn.Module, needs: frozenset[str], image: int, device: str
    ) -> Encoder | None:
        if not needs:
            return None
        _, width, heads = self.tower_shape(model)
        shapes = {"features_BND": (1, image, width), "keys_BNC": (1, image, width // heads)}
        shapes["queries_BNC"] = shapes["keys_BNC"]
        shapes["last_keys_BNC"] = shapes["features_BND"]
        return Encoder(
            **{name: torch.ones(shapes.get(name, (1, image)), device=device) for name in needs}
        )


def expert_weights(layer: nn.Module, top_k: int) -> int:
    """Weights of a layer's experts that one token meets: `top_k` of those that are kept in one
    tensor, whose first axis counts them."""
    return sum(
        min(top_k, len(weight)) * weight[0].numel()
        for part in layer.modules()
        if not isinstance(part, nn.Conv1d)
        for weight in part.parameters(recurse=False)
        if weight.ndim == 3
    )


def experts_per_token(config: Any) -> int:
    """How many experts a token goes through; 1 where there are none."""
    return next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), 1)
