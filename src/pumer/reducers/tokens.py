"""What a reducer sees of one layer: its tokens, and how many of each modality there are.

Shape suffixes: B batch, H heads, N tokens, T text tokens, D channels, C channels of a head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumer.reducers.plan import Plan

Grid = tuple[int, int]

EMBEDDINGS = -1
"""The position before the first layer, where `layers` may ask a reducer that needs no attention to
act."""


@dataclass(frozen=True)
class TokenShape:
    """How many tokens a layer has of each modality: what `Reducer.lengths` computes from.

    Args:
        text: text tokens, structure tokens and padding included.
        image: image tokens, structure tokens and padding included.
        layer: index of the layer, `EMBEDDINGS` before the first.
        num_prefix_tokens: structure tokens at the head of each modality, never candidates.
        grid: rows and columns of patches, for methods that go by position.
        entered: image tokens that entered the first layer, structure tokens included; None where
            nothing was reduced before. A later stage of DynamicViT keeps a share of these.
    """

    text: int
    image: int
    layer: int = 0
    num_prefix_tokens: int = 1
    grid: Grid | None = None
    entered: int | None = None

    @property
    def unchanged(self) -> tuple[int, int]:
        """(text, image) tokens after a layer that reduces nothing."""
        return self.text, self.image

    @property
    def structure(self) -> int:
        """Structure tokens of the image."""
        return min(self.num_prefix_tokens, self.image)

    @property
    def patches(self) -> int:
        """Image tokens that may be reduced: all but the structure tokens."""
        return self.image - self.structure


@dataclass(frozen=True)
class Encoder:
    """What a vision encoder knows of its image tokens; only what the reducer `needs`, else None.

    Every tensor is over the image tokens of a row alone, in their order, structure tokens left out,
    padding last.

    Args:
        features_BND: the encoder's output, before the projector.
        class_attention_BN: attention that [CLS] pays each token, mean over the heads.
        received_BN: attention that each token receives, mean over heads and queries.
        middle_received_BN: the same in the layer that the reducer names, `Traits.middle_layer`.
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
    middle_received_BN: Tensor | None = None
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
        num_prefix_tokens: structure tokens at the head of each modality, never candidates.
        grid: rows and columns of patches, if the image tokens are still all the patches of such a
            grid.
        patch_BN: int64, raster number of every token's patch in that grid, -1 for tokens that are
            none.
        states_BND: hidden states.
        input_BND: the same tokens as this layer was given them; None for reducers that do not ask,
            and outside of language models.
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
    num_prefix_tokens: int = 1
    grid: Grid | None = None
    patch_BN: Tensor | None = None
    states_BND: Tensor | None = None
    input_BND: Tensor | None = None
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
    def shape(self) -> TokenShape:
        """How many tokens there are, for `Reducer.lengths`."""
        image = self.mask_BN.shape[1] - self.text
        return TokenShape(self.text, image, self.layer, self.num_prefix_tokens, self.grid)

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
            head = min(start + self.num_prefix_tokens, stop) if plan is not None else stop
            plans.append(Plan.identity(self.mask_BN[:, start:head]))
            if plan is not None:
                plans.append(plan)
        return Plan.side_by_side(plans)
