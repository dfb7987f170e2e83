"""Vision-language models with a decoder: the base of every family, which is a short spec of what is
its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder.costs import DecoderCosts
from pumer.adapters.decoder.hooks import DecoderHooks
from pumer.adapters.decoder.parts import feature_depth, tower_layers
from pumer.adapters.decoder.prompt import CropGroups, ForwardState, ImageSpan, shift
from pumer.adapters.decoder.recurrent import state_macs
from pumer.adapters.decoder.shorten import BEFORE, SELECTS, STATES
from pumer.adapters.decoder.vision import (
    CLASS_ATTENTION,
    LAST_CLASS_ATTENTION,
    Captured,
    VisionCapture,
    vision_features,
)
from pumer.adapters.tower import blocks
from pumer.reducers import EMBEDDINGS, Reducer
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Encoder, Grid


class DecoderAdapter(DecoderCosts):
    """A stock model of transformers whose language model gets image features in the place of
    placeholders.

    Its parts go by the names that nearly all of them have; a family overrides what is different.
    """

    renumbers = True
    projects_tokens: ClassVar[bool] = False
    """Whether the projector takes every token by itself, and gives as many in their order."""
    causal: ClassVar[bool] = True
    """Whether a token of the prompt sees only those before it."""
    answers_in_prompt: ClassVar[bool] = True
    """Whether labels are those of the prompt's tokens, answers among them."""
    image_delimiters: ClassVar[tuple[int, int]] = (0, 0)
    """How many tokens before an image and behind it mark where it begins and ends."""
    on_host: ClassVar[tuple[str, ...]] = ()
    """Inputs of `get_image_features` that the model reads on the host: brought there once, in place
    of again and again."""
    placeholder_hook: ClassVar[str | None] = "get_placeholder_mask"
    """The method that marks the placeholders, or puts the features there; None where it is not told
    of the features."""
    image_token: ClassVar[str] = "image_token_id"
    """How the configuration calls the placeholder of images."""
    other_tokens: ClassVar[tuple[str, ...]] = ("video_token_id",)
    """And those of other media, in the order of the masks that `placeholder_hook` gives behind that
    of images; what the configuration lacks has none."""
    structure_tokens: ClassVar[tuple[str, ...]] = ()
    """Names of ids in the configuration, or of lists of them, that are no text but the structure of
    images."""
    along_tokens: ClassVar[tuple[str, ...]] = ()
    """Arguments of a layer that have an entry for every token, besides masks and positions."""
    merges_images: ClassVar[bool] = False
    """Whether the whole model puts features there before it calls its trunk, with embeddings alone;
    `placeholder_hook` is then None."""
    entrances: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods of the whole model that begin a call."""
    keeps_positions: ClassVar[bool] = True
    """Whether layers may be told positions with gaps between them; otherwise they count what is
    left, besides what is rotated by its position."""
    crop_gap: ClassVar[int | None] = None
    """Tokens that the prompt has at most between two crops of one image; None where `image_spans`
    are whole images."""
    reads_tower: ClassVar[bool] = True
    """Whether what the vision tower knows of patches can be read."""
    merges_in_tower: ClassVar[bool] = False
    """Whether tokens can be merged inside the vision tower: it has [CLS], if any, and then patches
    in raster order, and what follows it keeps every token, or makes one of every square."""
    tower_mask: ClassVar[str] = ""
    """The argument of the tower that is false for padded patches."""
    grouped: ClassVar[bool] = False
    """Whether the tower has the patches of one token side by side; otherwise rows of patches."""

    def tower_reason(self, model: nn.Module) -> str | None:
        if not self.merges_in_tower:
            return f"what follows the vision tower of {self.family} would mix merged tokens"
        layers = tower_layers(self.vision(model))
        unknown = next((layer for layer in layers if not blocks.is_known(layer)), None)
        if unknown is None:
            return None
        return f"{type(unknown).__name__}, a layer of its vision tower, is not known"

    def tower_depth(self, model: nn.Module) -> int:
        return 0 if self.tower_reason(model) else len(self.tower_acts(model))

    def tower_prefix(self, model: nn.Module) -> int:
        return int(self.has_class_token(model))

    def feature_depth(self, model: nn.Module) -> int:
        """How many layers of the vision tower make its features."""
        index = getattr(config_of(model), "vision_feature_layer", -1)
        return feature_depth(self.vision(model), -1 if index is None else index)

    def tower_acts(self, model: nn.Module) -> tuple[int, ...]:
        """The layers of the vision tower in which tokens can be merged, from 0."""
        return tuple(range(self.feature_depth(model)))

    def tower_attention_shape(self, model: nn.Module) -> tuple[int, int]:
        _, width, heads = self.tower_shape(model)
        return heads, width // heads

    def tower_mergers(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules of the vision tower that make one vector of the patches of a token."""
        return ()

    def tower_grids(self, trunk: Any, captured: Captured) -> list[Grid] | None:
        """Rows and columns of tokens of every image, where the tower has all images in one row."""
        return None

    def tower_windows(self, trunk: Any, captured: Captured) -> Sequence[int]:
        """How many tokens every window has that layers beside `tower_acts` attend in."""
        return ()

    def token_order(self, trunk: Any, captured: Captured) -> Tensor | None:
        """Index of every token among those of the tower, where it has them in another order."""
        return None

    def before_only(self, model: nn.Module) -> str | None:
        """Why tokens can leave before the language model alone; None where they can leave between
        its layers, too."""
        layers = self.layers(model)
        attentions = [self.layer_attention(layer) for layer in layers]
        if None in attentions or any(map(state_macs, layers)):
            return STATES
        indexers = [getattr(attention, "indexer", None) for attention in attentions]
        return SELECTS if any(indexer is not None for indexer in indexers) else None

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        return super().tower_attentions(model) if self.reads_tower else {}

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        """What the vision tower knows of the image tokens of every crop [R,I,...]: fields of
        `Encoder`."""
        rows, columns = self.default_grid(trunk)
        facts = vision_features(captured, self.has_class_token(trunk))
        return pool_squares(facts, rows * columns)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        """Every image that went through `get_image_features`, whose output is given."""
        facts = self.vision_facts(trunk, captured)
        return one_span_each(output.pooler_output, self.default_grid(trunk), facts)

    def spans_in_prompt(
        self, images: list[ImageSpan], image_BS: Tensor, inputs: dict[str, Any]
    ) -> list[ImageSpan]:
        """Those of the images of a call that its prompts have placeholders for, where only the
        prompt says which, or where one ends; asked for if there is no `placeholder_hook`."""
        return images

    def placeholder_mask(
        self, trunk: Any, input_ids: Tensor | None, embeddings: Tensor
    ) -> tuple[Tensor, ...]:
        """Which tokens are placeholders of images, bool [B,S], and of each other medium."""
        return tuple(
            self._is(trunk, token, input_ids, embeddings)
            for token in (getattr(trunk.config, self.image_token), *self._others(trunk))
        )

    def _others(self, trunk: Any) -> list[int]:
        tokens = [getattr(trunk.config, name, None) for name in self.other_tokens]
        return [token for token in tokens if token is not None]

    def _structure(self, trunk: Any) -> list[int]:
        values = [getattr(trunk.config, name) for name in self.structure_tokens]
        return [
            token
            for value in values
            for token in (value if isinstance(value, (list, tuple)) else [value])
        ]

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
        ids = inputs.get("input_ids")
        no_text = [*self._others(trunk), *self._structure(trunk)]
        for token in () if ids is None else no_text:
            is_token_BS: Any = ids == token
            around_BS = around_BS | is_token_BS.to(image_BS.device)
        return around_BS

    def crop_groups(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> CropGroups | None:
        """Which crops are of one image, where only the prompt says so; None where `image_spans` are
        whole images.

        Args:
            features: image features in the prompts.
        """
        if self.crop_gap is None:
            return None
        rows, columns = self.default_grid(trunk)
        return CropGroups.of(image_BS, rows * columns, features, gap=self.crop_gap)

    def output(self, state: ForwardState, output: Any) -> Any:
        """What the whole model gives, from what the stock one would give."""
        return output

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        """Change what is peculiar to the family."""

    def shape(self, model: nn.Module) -> ModelShape:
        shape, attentions = super().shape(model), self.tower_attentions(model)
        return replace(
            shape,
            last=shape.depth - 2,
            proportional=False,
            encoder=True,
            co_attention=None,
            encoder_depth=max(attentions, default=0),
            encoder_layers=tuple(attentions),
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
        if traits.needs_encoder and not self.reads_tower:
            raise ValueError(
                f"{reducer.name} asks what the vision tower knows of patches, which cannot be read "
                f"in {self.family}: take a reducer that looks at the language model alone"
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
        reason = self.before_only(model)
        if reason is not None and any(map(reducer.reduces_at, range(depth))):
            raise ValueError(
                f"{reducer.name} would drop tokens behind layers of the language model of "
                f"{type(model).__name__}. {reason}\n"
                f"Take a reducer that acts before it: {BEFORE}"
            )
        shared = {key for layer, key in enumerate(self.key_layers(model)) if key != layer}
        if any(reducer.reduces_at(layer) for layer in range(min(shared, default=depth), depth)):
            first = reducer.layer_offset
            raise ValueError(
                f"{reducer.name} would reduce behind layer {min(shared)}, whose keys the last "
                f"layers of {type(model).__name__} read: give layers {first} to "
                f"{first + min(shared) - 1}"
            )
        needs_class = {CLASS_ATTENTION, LAST_CLASS_ATTENTION} & reducer.traits.needs_encoder
        if needs_class and not self.has_class_token(model):
            raise ValueError(
                f"{reducer.name} asks what [CLS] attends to, and the vision tower of "
                f"{type(model).__name__} has no "
                '[CLS]: methods that take saliency="received" do without'
            )
        self.start(patch, model)

    def start(self, patch: Patch, model: nn.Module) -> DecoderHooks:
        """Put the reducer to work."""
        return DecoderHooks(patch, self, model)


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
        if value.shape[1] == tokens:
            result[name] = value
            continue
        side, pooled_side = math.isqrt(value.shape[1]), math.isqrt(tokens)
        square = value.unflatten(
            1, (pooled_side, side // pooled_side, pooled_side, side // pooled_side)
        )
        result[name] = square.mean((2, 4)).flatten(1, 2)
    return result
