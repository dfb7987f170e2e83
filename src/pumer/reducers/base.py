"""What a reducer is (`Reducer`), what it needs (`Traits`), what it is fitted to (`ModelShape`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pumer.reducers.plan import Plan
from pumer.reducers.tokens import EMBEDDINGS, Tokens, TokenShape

MAX_LAYERS = 10_000
"""Upper limit of layer settings, above the depth of any model."""


@dataclass(frozen=True)
class Traits:
    """What a reducer needs, and how it acts: all that adapters and reports ask of it.

    Args:
        needs_attention: `plan` reads `Tokens.attention_BHNN`; the layer then runs without a fused
            attention kernel.
        needs_qk: `plan` reads queries or keys, which decoders capture in the layers it acts after.
        needs_input: `plan` reads `Tokens.input_BND`, which only decoders provide.
        needs_encoder: fields of `Encoder` that `plan` reads. The adapter captures these and no
            others.
        middle_layer: layer of the vision encoder, counted from 1, that `Encoder.middle_received_BN`
            is of.
        needs_embeddings: `plan` reads `Tokens.embeddings`, which a language model keeps for it.
        needs_grid: `plan` reads `Tokens.grid` and `Tokens.patch_BN`.
        needs_text: the text guides it, so it cannot act in a vision tower.
        proportional_attention: attention counts a merged token as often as its size says (adds log
            size to the logits).
        official: reproduces published code, with its softmax and its counting of padded text.
        dynamic_length: the data decide how many slots are filled, so slots may stay empty although
            every token is real.
        per_crop: the budget is per crop of an image, as in the published code for LLaVA-NeXT.
        before_projector: features are merged before the projector, which then projects what is
            left. `plan` then reads nothing but masks and `Tokens.encoder`. Where a projector mixes
            tokens, features are merged after it.
        post_layer: acts after a layer, instead of between its attention and its MLP.
        drops_image: no image token may be left.
        learned: the reducer, or the part of it, that decides by trained parts, a `Learned`; or
            None.
        vision_reducer: what acts inside the vision tower before this reducer does, a `Reducer`; or
            None. See `Compose`.

    Example:
        >>> pumer.VisionZip().traits.before_projector
        True
    """

    needs_attention: bool = False
    needs_qk: bool = True
    needs_input: bool = False
    needs_encoder: frozenset[str] = frozenset()
    middle_layer: int | None = None
    needs_embeddings: bool = False
    needs_grid: bool = False
    needs_text: bool = False
    proportional_attention: bool = False
    official: bool = False
    dynamic_length: bool = False
    per_crop: bool = False
    before_projector: bool = False
    post_layer: bool = False
    drops_image: bool = False
    learned: Any = None
    vision_reducer: Reducer | None = None

    @classmethod
    def union(cls, parts: Iterable[Traits]) -> Traits:
        """The traits of several reducers in one model: each is there if any of them has it."""
        traits = list(parts)
        # The flags and parts that any of them sets; what none sets keeps its default.
        combined: dict[str, Any] = {
            name: value for each in traits for name, value in vars(each).items() if value
        }
        combined["needs_qk"] = any(each.needs_qk for each in traits)
        combined["needs_encoder"] = frozenset().union(*(each.needs_encoder for each in traits))
        return cls(**combined)


@dataclass(frozen=True)
class ModelShape:
    """What `Reducer.resolve` fits open settings to.

    Args:
        depth: number of layers.
        last: the last layer that a reducer can act in; in a decoder, the one before the last.
        image: image tokens of an image of the configured size, without structure tokens; 0 if
            unknown.
        proportional: whether proportional attention is possible.
        encoder: whether a vision tower feeds a language model, so that `Tokens.encoder` is set.
        co_attention: whether text and image have a separate cross-attention, as in METER; None if
            unknown.
        tower: shape of the vision tower; None where there is none that can be reduced.
        encoder_depth: layers of the vision tower that feeds a language model.
        encoder_layers: those of them, counted from 1, that attend to the whole image.
    """

    depth: int
    last: int
    image: int = 0
    proportional: bool = True
    encoder: bool = False
    co_attention: bool | None = None
    tower: ModelShape | None = None
    encoder_depth: int = 0
    encoder_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reducer:
    """A method of token reduction: its fields are the settings, `plan` is the method.

    A subclass is a frozen dataclass in its own file. It knows tensors, and no model. A setting
    whose default depends on the model is None until `resolve` fits it to one.

    Example:
        >>> isinstance(pumer.ToMe(), pumer.Reducer)
        True
        >>> pumer.ToMe(r=16).settings()
        {'r': 16, 'depth': None, 'proportional': None}
    """

    name: ClassVar[str]
    layer_offset: ClassVar[int] = 0
    """Difference between a layer in this method's settings and in `layers`."""
    added: ClassVar[tuple[str, ...]] = ()
    """Settings of a later version. They are saved only where they differ from the default, so that
    older files and their digests stay the same."""

    def resolve(self, model: ModelShape) -> Self:
        """This reducer with all open settings fitted to a model; called by `pumer.apply`."""
        return self

    @property
    def traits(self) -> Traits:
        """What it needs, and how it acts. Override it where the defaults do not fit."""
        return Traits()

    def reduces_at(self, layer: int) -> bool:
        """Whether the method acts in this layer."""
        if self.layers is None:
            if layer == EMBEDDINGS:  # layers fitted to a model are never before the first
                return False
            raise ValueError(
                f"the layers of {self.name} depend on the model: give `layers`, or let "
                "pumer.apply choose them"
            )
        return layer in self.layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that reduce, counted from 0; may be a field that is None until `resolve`."""
        raise NotImplementedError

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        """(text, image) tokens after this layer, structure tokens included.

        Where the data decide how many stay, this is an upper bound.
        """
        raise NotImplementedError

    def plan(self, tokens: Tokens) -> Plan:
        """The plan for the tokens of one layer."""
        raise NotImplementedError

    def check(self, depth: int) -> None:
        """Raise ValueError if the settings do not fit a model with `depth` layers."""
        beyond = [layer for layer in self.layers if not EMBEDDINGS <= layer < depth]
        if not beyond:
            return
        names = [field.name for field in dataclasses.fields(self)]
        if "layer" in names:
            (layer,) = beyond
            raise ValueError(
                f"{self.name} has layer={layer + self.layer_offset}, but the model has layers 0 to "
                f"{depth - 1}: give layer {self.layer_offset} to {depth - 1 + self.layer_offset}"
            )
        raise ValueError(
            f"{self.name} reduces in layers {beyond}, but the model has layers 0 to {depth - 1}: "
            + (f"give depth={depth}, or leave it out" if "depth" in names else "choose among these")
        )

    @classmethod
    def upgraded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings saved by an older version, under their current names."""
        return settings

    def settings(self) -> dict[str, Any]:
        """The settings as plain data, for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_ratios(**ratios: float) -> None:
    """Raise ValueError unless every ratio lies in [0, 1)."""
    for name, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ValueError(f"{name} is a ratio in [0, 1), not {ratio}")


def check_layers(layers: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Layers as a sorted tuple without repeats; raises ValueError for anything but whole numbers
    from -1."""
    if any(not isinstance(layer, int) or not EMBEDDINGS <= layer < MAX_LAYERS for layer in layers):
        raise ValueError(
            f"layers are whole numbers from 0 (-1: before the first layer), not {layers!r}"
        )
    return tuple(sorted(set(layers)))
