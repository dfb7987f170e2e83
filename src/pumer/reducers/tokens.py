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
"""In `layers`: before the first layer, for reducers that need no attention."""


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

    Example:
        >>> from pumer.reducers import TokenShape
        >>> pumer.PuMer(layers=(2, 5, 8)).lengths(TokenShape(text=40, image=145, layer=2))
        (32, 87)
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
    """Outputs of a vision encoder for its image tokens; None unless in `Traits.needs_encoder`.

    Every tensor has the image tokens of a row in their order, without structure tokens, padding
    last.

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

    Example:
        >>> from pumer.reducers import Encoder
        >>> Encoder(received_BN=torch.tensor([[0.1, 0.7, 0.2]])).at(torch.tensor([1])).received_BN
        tensor([[0.7000]])
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
        """The outputs at some image tokens, given by their indices on the host."""
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
    """Keys that the text attends to in addition to the tokens that a reducer is shown.

    A cached prefix, other turns, separators and structure tokens are keys of the model's softmax.
    With them in the reducer's softmax, what is kept does not depend on how a prompt is split into
    calls.

    Args:
        keys_BHMC: with as many heads as the keys of `Tokens`.
        valid_BM: bool, false for padding and for masked tokens.
        place_BM: int64, their positions, counted as in `Tokens.place_BN`; None without a causal
            mask.
        window: size of a sliding window: a token sees only positions later than its own minus this
            number; None for all.
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
    """Inputs of a language model's first layer, for reducers with `Traits.needs_embeddings`.

    Args:
        text_BTD: at the text tokens of `Tokens`.
        image_BID: at all image tokens of the prompt, including those dropped since.
        valid_BI: bool, false for padding.
    """

    text_BTD: Tensor
    image_BID: Tensor
    valid_BI: Tensor


@dataclass(frozen=True)
class Tokens:
    """What a reducer sees of one layer: the text tokens, then the image tokens.

    In each modality the structure token ([CLS]) comes first, then real tokens, then padding.

    Args:
        mask_BN: attention mask, bool (or float where a published checkpoint works with fractional
            ones).
        text: number of text tokens, padding included; the others are of the image.
        sizes_BN: how many source tokens each token stands for, float32.
        layer: index of the layer, `EMBEDDINGS` before the first.
        num_prefix_tokens: structure tokens at the head of each modality, never candidates.
        grid: rows and columns of patches, while the image tokens are all the patches of a grid.
        patch_BN: int64, raster index of every token's patch in that grid, -1 for tokens that are no
            patch.
        carried_BN: float32, what the plan of the last layer that reduced carries on
            (`Plan.carried_BN`), summed over the tokens that each stands for; None without such.
        states_BND: hidden states.
        input_BND: the input of this layer for the same tokens; None unless `Traits.needs_input`.
        queries_BHNC: of this layer's attention; None at `EMBEDDINGS`.
        keys_BHNC: of this layer's attention; None at `EMBEDDINGS`.
        normalizer_BHN: log-sum-exp of every token's logits over all keys that it sees in the model,
            float32: attention is exp(logit - normalizer). None where the attention kernel does not
            return it.
        attention_BHNN: attention probabilities, for reducers with `Traits.needs_attention`.
        cross: whether text and image have a separate cross-attention. Queries are then those of the
            text, keys of the image those of the cross-attention, keys of the text those of its
            self-attention, and `attention_BHNN` is [B,H,T,I], a softmax over the image.
        place_BN: position of every token in the sequence, where attention is causal; rising within
            a modality. None without a causal mask.
        context: further keys that the text attends to, in a language model; None elsewhere.
        question_BT: bool, words of the question: those that the caller marks, or those after the
            first image, or all if there are none; None for all.
        embeddings: inputs of the first layer; None where they are unknown or not needed.
        encoder: outputs of the vision encoder, between it and a language model; None elsewhere.
        entered_BI: bool, mask of the image tokens, without structure tokens, that entered the first
            layer; None if none were reduced since.
        part: the trainable part of a learned reducer for this layer.
        gate_BN: in its training, 1 for tokens that every layer before keeps; None before the first
            decision.
        progress: of its training, 0 to 1.

    Example:
        >>> from pumer.reducers import Tokens
        >>> mask = torch.ones(1, 5, dtype=torch.bool)
        >>> tokens = Tokens(mask_BN=mask, text=2, sizes_BN=torch.ones(1, 5))
        >>> tokens.shape.patches  # three image tokens, of which the first is [CLS]
        2
    """

    mask_BN: Tensor
    text: int
    sizes_BN: Tensor
    layer: int = 0
    num_prefix_tokens: int = 1
    grid: Grid | None = None
    patch_BN: Tensor | None = None
    carried_BN: Tensor | None = None
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
        """Slice of the image tokens, structure tokens included."""
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
        """The plan for all tokens from the plans of each modality; structure tokens stay.

        `text` is None if the text is not reduced.
        """
        plans = []
        for start, stop, plan in ((0, self.text, text), (self.text, self.mask_BN.shape[1], image)):
            head = min(start + self.num_prefix_tokens, stop) if plan is not None else stop
            plans.append(Plan.identity(self.mask_BN[:, start:head]))
            if plan is not None:
                plans.append(plan)
        return Plan.side_by_side(plans)
