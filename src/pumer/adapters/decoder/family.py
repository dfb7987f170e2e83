"""Vision-language models with a decoder: the base of every family, which is a short spec of what is
its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Adapter, Patch, config_of
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder.hooks import DecoderHooks
from pumer.adapters.decoder.prompt import CropGroups, ImageSpan, shift
from pumer.adapters.decoder.vision import (
    CLASS_ATTENTION,
    LAST_CLASS_ATTENTION,
    Captured,
    VisionCapture,
    vision_features,
)
from pumer.adapters.macs import head_macs
from pumer.reducers import EMBEDDINGS, Reducer
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Encoder, Grid


class DecoderAdapter(Adapter):
    """A stock model of transformers whose language model gets image features in the place of
    placeholders.

    Its parts go by the names that nearly all of them have; a family overrides what is different.
    """

    num_prefix_tokens = 0
    renumbers = True
    projects_tokens: ClassVar[bool] = False
    """Whether the projector takes every token by itself, and gives as many in their order."""
    causal: ClassVar[bool] = True
    """Whether a token of the prompt sees only those before it."""
    image_delimiters: ClassVar[tuple[int, int]] = (0, 0)
    """How many tokens before an image and behind it mark where it begins and ends."""
    on_host: ClassVar[tuple[str, ...]] = ()
    """Inputs of `get_image_features` that the model reads on the host: brought there once, in place
    of again and again."""
    placeholder_hook: ClassVar[str] = "get_placeholder_mask"
    """The method that marks the placeholders, or puts the features there."""

    def trunk(self, model: nn.Module) -> Any:
        """The model without its language-modelling head, where text and images meet."""
        return model.model if hasattr(model, "lm_head") else model

    def language(self, model: nn.Module) -> Any:
        """The decoder."""
        return self.trunk(model).language_model

    def projector(self, model: nn.Module) -> nn.Module:
        """What takes the vision tower's features to the language model's width."""
        return self.trunk(model).multi_modal_projector

    def tower_attention(self, model: nn.Module) -> Any:
        """The attention of the layer of the vision tower that its features come from."""
        raise NotImplementedError

    def last_attention(self, model: nn.Module) -> Any:
        """The attention of the vision tower's last layer; None where it is that of
        `tower_attention`."""
        return None

    def has_class_token(self, model: nn.Module) -> bool:
        """Whether the vision tower has a [CLS] token."""
        return False

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        """What the vision tower knows of the image tokens of every crop [R,I,...]: fields of
        `Encoder`."""
        return vision_features(captured)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        """Every image that went through `get_image_features`, whose output is given."""
        raise NotImplementedError

    def placeholder_mask(
        self, trunk: Any, input_ids: Tensor | None, embeddings: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Which tokens are placeholders of images, bool [B,S], and of videos; None in families
        without video."""
        image = self._is(trunk, trunk.config.image_token_id, input_ids, embeddings)
        video = getattr(trunk.config, "video_token_id", None)
        return image, None if video is None else self._is(trunk, video, input_ids, embeddings)

    def _is(self, trunk: Any, token: int, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        if input_ids is not None:
            return (input_ids == token).to(embeddings.device)
        looked_up = trunk.get_input_embeddings()(torch.full((), token, device=embeddings.device))
        return (embeddings == looked_up).all(-1)

    def non_text_mask(
        self, trunk: Any, image_BS: Tensor, joined: CropGroups | None, inputs: dict[str, Any]
    ) -> Tensor:
        """Which tokens are no text: images, videos, and the structure around them and between their
        crops."""
        none_BS = image_BS if joined is None else image_BS | joined.between_BS
        before, behind = self.image_delimiters
        around_BS = none_BS
        for step in range(-before, behind + 1):
            around_BS = around_BS | shift(none_BS, step)
        video, ids = getattr(trunk.config, "video_token_id", None), inputs.get("input_ids")
        return (
            around_BS
            if video is None or ids is None
            else around_BS | (ids == video).to(image_BS.device)
        )

    def crop_groups(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> CropGroups | None:
        """Which crops are of one image, where only the prompt says so; None where `image_spans` are
        whole images.

        Args:
            features: image features in the prompts.
        """
        return None

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        """Change what is peculiar to the family."""

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(self.language(model).layers)

    def shape(self, model: nn.Module) -> ModelShape:
        shape = super().shape(model)
        return replace(
            shape, last=shape.depth - 2, proportional=False, encoder=True, co_attention=None
        )

    def check(self, reducer: Reducer) -> None:
        traits = reducer.traits
        if traits.vision_reducer is not None and reducer.reduces_at(EMBEDDINGS):
            raise ValueError(
                "what the vision tower merged is gathered before the language model, where "
                f"{reducer.name} would act, too: compose it with a reducer inside the language "
                "model, or with none"
            )
        if traits.official or traits.needs_attention:
            raise ValueError(
                f"{reducer.name} needs whole attention maps, which decoders do not make: give "
                "official=False"
            )
        if traits.proportional_attention:
            raise ValueError(
                f"{reducer.name}: decoders do not count merged tokens by size; give "
                "proportional=False"
            )
        if traits.learned is not None:
            raise ValueError(
                f"{reducer.name} decides by trained parts, which decoders cannot train yet"
            )

    def patch(self, model: nn.Module, patch: Patch) -> None:
        reducer, depth = patch.reducer, self.depth(model)
        decoder_attention.check_backend(self.language(model).config)
        if reducer.reduces_at(depth - 1):
            first = reducer.layer_offset
            raise ValueError(
                f"{reducer.name} would reduce after the last layer, {depth - 1}, where nothing is "
                f"left to be saved: give layers {first} to {first + depth - 2}"
            )
        needs_class = {CLASS_ATTENTION, LAST_CLASS_ATTENTION} & reducer.traits.needs_encoder
        if needs_class and not self.has_class_token(model):
            raise ValueError(
                f"{reducer.name} asks what [CLS] attends to, and the vision tower of "
                f"{type(model).__name__} has no "
                '[CLS]: methods that take saliency="received" do without'
            )
        DecoderHooks(patch, self, model)

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        return DEFAULT_TEXT, rows * columns

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).vision_config
        side = side_length(vision.image_size) // side_length(vision.patch_size)
        return side, side

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        config = config_of(model).get_text_config()
        heads = config.num_attention_heads
        return heads, getattr(config, "head_dim", None) or config.hidden_size // heads

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        """Tokens leave after a layer, whatever `after_layer` says; attention is counted over all
        pairs of tokens."""
        config = config_of(model).get_text_config()
        heads, channels = self.attention_shape(model)
        width, inner = config.hidden_size, config.intermediate_size
        projections = 2 * width * channels * (heads + config.num_key_value_heads)
        counts = [sum(pair) for pair in lengths[:-1]]
        return [
            (count * projections + 2 * count**2 * heads * channels, 3 * count * width * inner)
            for count in counts
        ]

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
        return crops, image * self.patches_per_token(model) // crops + int(
            self.has_class_token(model)
        )

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
        crops, crop_length = self.tower_entry(model, image)
        inside = set(projector.modules())
        weights = sum(
            part.weight.numel()
            for part in vision.modules()
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)) and part not in inside
        )
        config = config_of(model).vision_config
        depth = getattr(config, "num_hidden_layers", None) or config.depth
        width = getattr(config, "embed_dim", None) or config.hidden_size
        pairs = 2 * crop_length**2 * width * depth
        project = linear_weights(projector)
        spared = 0
        layer: Any
        # Layers behind those that the features come from are run by the stock model alone.
        passes = (
            [*pairwise(tower), *[(0, 0)] * (depth + 1 - len(tower))] if len(set(tower)) > 1 else []
        )
        for layer, (before, after) in zip(
            tower_layers(vision) if passes else (), passes, strict=True
        ):
            spared += (crop_length - before) * linear_weights(layer.self_attn) + (
                crop_length - after
            ) * linear_weights(layer.mlp)
            spared += 2 * (crop_length**2 - before**2) * width
        return crops * (crop_length * weights + pairs - spared), image * project

    def vision(self, model: nn.Module) -> Any:
        """The vision tower."""
        return self.trunk(model).vision_tower

    def patches_per_token(self, model: nn.Module) -> int:
        """How many patches of the vision tower become one token of the language model."""
        return 1

    def encoder_facts(
        self, model: nn.Module, needs: frozenset[str], image: int, device: str
    ) -> Encoder | None:
        if not needs:
            return None
        config = config_of(model).vision_config
        width = getattr(config, "embed_dim", None) or config.hidden_size
        heads = getattr(config, "num_attention_heads", None) or config.num_heads
        shapes = {"features_BND": (1, image, width), "keys_BNC": (1, image, width // heads)}
        shapes["queries_BNC"] = shapes["keys_BNC"]
        shapes["last_keys_BNC"] = shapes["features_BND"]
        return Encoder(
            **{name: torch.ones(shapes.get(name, (1, image)), device=device) for name in needs}
        )


DEFAULT_TEXT = 64
"""Text tokens of a prompt, where nothing else is said."""


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def side_length(size: Any) -> int:
    """A side's length, which some configurations give twice."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def tower_layers(tower: Any) -> nn.ModuleList:
    """The layers of a CLIP, SigLIP or InternVL tower."""
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def feature_depth(tower: Any, index: int | Sequence[int]) -> int:
    """How many layers of a vision tower make the hidden states of this index, or of the last of
    several."""
    depth = len(tower_layers(tower))
    return max(
        layer_index if layer_index >= 0 else depth + 1 + layer_index
        for layer_index in ([index] if isinstance(index, int) else index)
    )


def one_span_each(
    features: Sequence[Tensor] | Tensor,
    grid: Grid | None,
    known: dict[str, Tensor],
    structure: Tensor | None = None,
) -> list[ImageSpan]:
    """Images that are one row of features each and one of what the vision tower knows."""
    images = []
    for image_index, features_ND in enumerate(features):
        encoder = (
            Encoder(**{name: value[image_index : image_index + 1] for name, value in known.items()})
            if known
            else None
        )
        images.append(ImageSpan(len(features_ND), structure, grid, encoder))
    return images


def pool_squares(known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """What is known of patches in a square [R,P,...], averaged over the squares that become one of
    `tokens` tokens."""
    result = {}
    for name, value in known.items():
        side, pooled_side = math.isqrt(value.shape[1]), math.isqrt(tokens)
        square = value.unflatten(
            1, (pooled_side, side // pooled_side, pooled_side, side // pooled_side)
        )
        result[name] = square.mean((2, 4)).flatten(1, 2)
    return result
