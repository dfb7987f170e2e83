"""What a reducer sees (`Tokens`) and what it is (`Reducer`).

Shape suffixes: B batch, H heads, N tokens, T text tokens, D channels, C channels of a head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pumer.reducers.plan import Plan

Grid = tuple[int, int]

MAX_LAYERS = 10_000
"""More layers than any model has; settings beyond it would only fill the memory."""
EMBEDDINGS = -1
"""The place before the first layer, where `layers` may ask a reducer that needs no attention to
act."""


@dataclass(frozen=True)
class Encoder:
    """What a vision encoder knows of its image tokens; only what the reducer `needs`, else None.

    Every tensor is over the image tokens of a row alone, in their order, structure tokens left out,
    padding last.

    Args:
        features_BND: the encoder's output, before the projector.
        class_attention_BN: attention that [CLS] pays each token, mean over the heads.
        received_BN: attention that each token receives, mean over heads and queries.
        keys_BNC: mean over the heads.
        queries_BNC: mean over the heads.
        given_BN: attention that each token pays the image tokens, mean over heads and these.
        last_class_attention_BN: attention that [CLS] pays each token in the tower's last layer,
            all heads taken as one: the softmax over all tokens of the products of whole queries
            and keys, divided by the root of their width.
        last_keys_BNC: keys of that layer, those of all heads side by side.
    """

    features_BND: Tensor | None = None
    class_attention_BN: Tensor | None = None
    received_BN: Tensor | None = None
    keys_BNC: Tensor | None = None
    queries_BNC: Tensor | None = None
    given_BN: Tensor | None = None
    last_class_attention_BN: Tensor | None = None
    last_keys_BNC: Tensor | None = None

    def at(self, index_I: Tensor) -> Encoder:
        """The same of some image tokens, given by their numbers on the host."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Encoder(
            **{
                name: value.index_select(1, index_I.to(value.device, non_blocking=True))
                for name, value in facts.items()
                if value is not None
            }
        )


@dataclass(frozen=True)
class Context:
    """What the text attends to besides the tokens that a reducer is shown.

    A cached prefix, other turns, separators and structure tokens are keys of the model's own
    softmax, so they are keys
    of ours: what is kept then does not depend on how a prompt is cut into calls.

    Args:
        keys_BHMC: their keys, as many heads as the keys of `Tokens`.
        valid_BM: bool, false for padding, and for what nobody may attend to.
        place_BM: int64, their places in the numbering of `Tokens.place_BN`; None where all tokens
            see each other.
        window: a token sees only places later than its own less this number; None for all.
        softcap: logits are `softcap * tanh(logits / softcap)`, as in Gemma 2; None leaves them as
            they are.
    """

    keys_BHMC: Tensor
    valid_BM: Tensor
    place_BM: Tensor | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Embeddings:
    """What entered the first layer of a language model, for a reducer that `reads_embeddings`.

    Args:
        text_BTD: at the text tokens of `Tokens`.
        image_BID: at all image tokens of the prompt, those that earlier layers have dropped too.
        valid_BI: bool, false for padding.
    """

    text_BTD: Tensor
    image_BID: Tensor
    valid_BI: Tensor


@dataclass(frozen=True)
class Tokens:
    """The token axis of one layer as a reducer may look at it: text first, then the image.

    In each modality the structure token ([CLS]) comes first, then real tokens, then padding.

    Args:
        mask_BN: attention mask, bool (or float where a published checkpoint works with fractional
            ones).
        text: number of text tokens, padding included; the rest is the image. 0 where there is no
            text.
        sizes_BN: how many source tokens each token stands for, float32.
        layer: number of the layer, `EMBEDDINGS` before the first.
        prefix: structure tokens at the head of each modality, never candidates.
        grid: rows and columns of patches, if the image tokens are still all the patches of such a
            grid.
        patch_BN: int64, raster number of every token's patch in that grid, -1 for tokens that are
            none.
        states_BND: hidden states.
        queries_BHNC: of this layer's attention; None at `EMBEDDINGS`.
        keys_BHNC: of this layer's attention; None at `EMBEDDINGS`.
        normalizer_BHN: log-sum-exp of every token's logits over all keys that it sees in the model,
            float32: attention is the exponential of a logit less this. None where the layer's
            kernel does not say.
        attention_BHNN: attention probabilities, only for a reducer that `needs` them.
        cross: whether the text attends to the image by itself, as in co-attention: the queries are
            those of the text alone, the keys of the image those it was asked by, and
            `attention_BHNN` is [B,H,T,I], a softmax over the image. The keys of the text are those
            of its self-attention.
        place_BN: where attention is causal, the place of every token in the sequence: it is seen by
            itself and by those that come later. Real tokens of a modality stand in this order. None
            where all tokens see each other.
        context: what the text attends to besides these tokens, in a language model; None elsewhere.
        question_BT: bool, the words that are the question: those that the caller names, or those
            behind the first image, or all where there are none; None for all. What images are rated
            by, where a method reads words.
        embeddings: what entered the first layer; None where it is not known, and for reducers
            that do not ask.
        encoder: what the vision encoder knows, between it and a language model; None elsewhere.
        entered_BI: bool, mask of the image tokens, structure tokens left out, that entered the
            first layer; None where none have gone since.
        part: what a learned reducer has trained for this layer.
        gate_BN: while that is trained, 1 for tokens that no layer before has decided against; None
            before the first.
        progress: of that training, 0 to 1.
    """

    mask_BN: Tensor
    text: int
    sizes_BN: Tensor
    layer: int = 0
    prefix: int = 1
    grid: Grid | None = None
    patch_BN: Tensor | None = None
    states_BND: Tensor | None = None
    queries_BHNC: Tensor | None = None
    keys_BHNC: Tensor | None = None
    normalizer_BHN: Tensor | None = None
    attention_BHNN: Tensor | None = None
    cross: bool = False
    place_BN: Tensor | None = None
    context: Context | None = None
    question_BT: Tensor | None = None
    embeddings: Embeddings | None = None
    encoder: Encoder | None = None
    entered_BI: Tensor | None = None
    part: nn.Module | None = None
    gate_BN: Tensor | None = None
    progress: float = 1.0

    @property
    def valid_BN(self) -> Tensor:
        """Bool mask of the real tokens."""
        return self.mask_BN if self.mask_BN.dtype == torch.bool else self.mask_BN > 0

    @property
    def image(self) -> slice:
        """Where the image tokens are, structure tokens included."""
        return slice(self.text, self.mask_BN.shape[1])

    @property
    def mean_keys_BNC(self) -> Tensor:
        """Keys averaged over the heads: what ToMe and PuMer measure similarity on."""
        if self.keys_BHNC is None:
            raise ValueError(
                "there are no keys before the first layer: give `layers` numbers from 0"
            )
        return self.keys_BHNC.mean(1)

    def with_structure(self, text: Plan | None, image: Plan) -> Plan:
        """The plan for the whole axis: structure tokens stay, the rest of each modality follows its
        own plan.

        `text` is None where text is left alone.
        """
        plans = []
        for start, stop, plan in ((0, self.text, text), (self.text, self.mask_BN.shape[1], image)):
            head = min(start + self.prefix, stop) if plan is not None else stop
            plans.append(Plan.identity(self.mask_BN[:, start:head]))
            if plan is not None:
                plans.append(plan)
        return Plan.side_by_side(plans)


@dataclass(frozen=True)
class ModelShape:
    """What `Reducer.resolve` fits open settings to.

    Args:
        depth: number of layers.
        last: the last layer that a reducer can act in; a decoder has nothing to save after its last
            layer.
        image: image tokens of an image of the configured size, structure tokens left out; 0 if not
            known.
        proportional: whether attention can count a merged token as often as its size says.
        encoder: whether a vision tower feeds a language model, so that `Tokens.encoder` is there.
        tower: of the vision tower; None where there is none that can be reduced.
    """

    depth: int
    last: int
    image: int = 0
    proportional: bool = True
    encoder: bool = False
    tower: ModelShape | None = None


@dataclass(frozen=True)
class Reducer:
    """A method of token reduction: its fields are the settings, `plan` is the method.

    A subclass is a frozen dataclass in a file of its own, tensors only, no knowledge of any model.
    A setting whose default depends on the model is None until `resolve` fits it to one.
    """

    name: ClassVar[str]
    layer_offset: ClassVar[int] = 0
    """What a user adds to a layer of `layers` to say it in this method's own settings."""
    added: ClassVar[tuple[str, ...]] = ()
    """Settings that came later. They are written where they are not the default alone, so that what
    was saved before, and digests of it, stay as they are."""

    def resolve(self, model: ModelShape) -> Self:
        """This reducer with every setting that was left open fitted to a model; `pumer.apply` calls
        it."""
        return self

    @property
    def needs_attention(self) -> bool:
        """Whether `plan` reads `Tokens.attention_BHNN`, which costs the fused attention of that
        layer."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields of `Encoder` that `plan` reads: the adapter gets these and no
        others."""
        return frozenset()

    @property
    def reads_embeddings(self) -> bool:
        """Whether `plan` reads `Tokens.embeddings`, which a language model keeps for it."""
        return False

    @property
    def weighs_by_size(self) -> bool:
        """Whether attention is to count a merged token as often as its size says (adds log size to
        the logits)."""
        return False

    @property
    def published(self) -> bool:
        """Whether this reproduces published code, with its softmax and its counting of padded
        text."""
        return False

    @property
    def leaves_gaps(self) -> bool:
        """Whether slots may stay empty although every token is real, because the data decide how
        many are filled."""
        return False

    @property
    def in_tower(self) -> Reducer | None:
        """What acts inside the vision tower before this reducer does; see `Compose`."""
        return None

    @property
    def per_crop(self) -> bool:
        """Whether each crop of an image has a budget of its own, as in the published code for
        LLaVA-NeXT."""
        return False

    @property
    def before_projector(self) -> bool:
        """Whether features are merged before the projector, which then projects what is left.

        `plan` then reads nothing but masks and `Tokens.encoder`. Where a projector does not take
        every token by itself they are merged after it.
        """
        return False

    @property
    def learned(self) -> Any:
        """The reducer, or the part of it, that decides by trained parts, a `Learned`; or None."""
        return None

    @property
    def after_layer(self) -> bool:
        """Whether it acts after a layer, in place of between the layer's attention and MLP."""
        return False

    def reduces_at(self, layer: int) -> bool:
        """Whether the method acts in this layer."""
        if self.layers is None:
            if layer == EMBEDDINGS:  # layers that are fitted to a model are counted from 0
                return False
            raise ValueError(
                f"the layers of {self.name} depend on the model: give `layers`, or let "
                "pumer.apply choose them"
            )
        return layer in self.layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that reduce, counted from 0; a field that is None until it is resolved."""
        raise NotImplementedError

    def lengths(
        self, text: int, image: int, layer: int, prefix: int = 1, grid: Grid | None = None
    ) -> tuple[int, int]:
        """Length of the text and of the image axis after this layer, both with their `prefix`
        structure tokens.

        `grid` is the (rows, columns) of patches, for methods that go by place.
        """
        raise NotImplementedError

    def lengths_from(
        self,
        entered: int,
        text: int,
        image: int,
        layer: int,
        prefix: int = 1,
        grid: Grid | None = None,
    ) -> tuple[int, int]:
        """`lengths` where a later layer's budget depends on the image tokens there were at first.

        Of most methods it does not, and this is `lengths`. DynamicViT keeps shares of that number.

        Args:
            entered: image tokens that entered the first layer, structure tokens included.
            text: length of the text axis before this layer.
            image: length of the image axis before this layer.
            layer: number of the layer.
            prefix: structure tokens at the head of each axis.
            grid: rows and columns of patches.
        """
        return self.lengths(text, image, layer, prefix, grid)

    def plan(self, tokens: Tokens) -> Plan:
        """Where every token of the layer goes."""
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
        """Settings that an older version saved, under the names that they have today."""
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
