"""What methods share that keep a given number of image tokens.

The number is independent of the method: `keep` sets it, or `Energy` does, image by image.

Shape suffixes: B batch, I image tokens without structure tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Reducer
from pumer.reducers.ops.budget import Count, check_keep, num_keep
from pumer.reducers.ops.matching import rank
from pumer.reducers.plan import Plan
from pumer.reducers.tokens import EMBEDDINGS, Tokens, TokenShape

SALIENCY = {"class": "class_attention_BN", "received": "received_BN"}
"""The field of `Encoder` that rates image tokens: attention of [CLS], or, for encoders without
[CLS], of all tokens."""


@dataclass(frozen=True)
class Selector(Reducer):
    """Keep a given number of image tokens, by default between vision tower and language model.

    Args:
        keep: image tokens to keep: a share (float) or a number (int). Images with fewer tokens
            keep all.

    Example:
        >>> from pumer.reducers import Selector
        >>> issubclass(pumer.FastV, Selector)
        True
    """

    keep: float | int = 0.25

    def __post_init__(self) -> None:
        check_keep(keep=self.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        return (EMBEDDINGS,)

    def budget(self, count: Count, layer: int) -> Count:
        """How many of `count` image tokens stay in this layer."""
        return num_keep(self.keep, count)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not self.reduces_at(shape.layer):
            return shape.unchanged
        return shape.text, shape.structure + self.budget(shape.patches, shape.layer)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        if valid_BI.shape[1] == 0:
            return Plan.identity(tokens.mask_BN)
        num_keep_B = self.budget(valid_BI.sum(1), tokens.layer)
        image = self.reduce_to(tokens, num_keep_B, self.budget(valid_BI.shape[1], tokens.layer))
        return tokens.with_structure(None, image)

    def reduce_to(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Plan:
        """The plan for the image tokens without structure tokens; fills `num_keep_B` of `most`
        slots."""
        return Plan.keep(self.select(tokens, num_keep_B, most), most)

    def select(self, tokens: Tokens, num_keep_B: Tensor, most: int) -> Tensor:
        """Which image tokens stay, bool [B,I]: `num_keep_B` in every row, at most `most`, and never
        padding."""
        raise NotImplementedError


def candidates(tokens: Tokens) -> Tensor:
    """Which image tokens are real, without structure tokens: bool [B,I]."""
    return tokens.valid_BN[:, tokens.text + tokens.num_prefix_tokens :]


def image_states(tokens: Tokens) -> Tensor:
    """Their states, float32 [B,I,D], zero at padding and where not finite."""
    if tokens.states_BND is None:
        raise ValueError("this method compares the states of tokens, and there are none here")
    states_BID = tokens.states_BND[:, tokens.text + tokens.num_prefix_tokens :].float()
    return torch.where(candidates(tokens)[..., None] & states_BID.isfinite(), states_BID, 0.0)


def encoded(tokens: Tokens, name: str) -> Tensor:
    """A field of `Tokens.encoder`, float32 [B,I] or [B,I,D], zero at padding and where not finite.

    Raises:
        ValueError: where it is not available.
    """
    value = None if tokens.encoder is None else getattr(tokens.encoder, name)
    if value is None:
        raise ValueError(
            f"the method needs the vision encoder's {name}, which is not available here: "
            'for models without [CLS] try saliency="received"'
        )
    value, valid = value.float(), candidates(tokens)
    return torch.where(
        (valid if value.ndim == 2 else valid[..., None]) & value.isfinite(), value, 0.0
    )


def check_saliency(saliency: str) -> None:
    """Raise ValueError unless this names one of `SALIENCY`."""
    if saliency not in SALIENCY:
        raise ValueError(f"saliency is one of {', '.join(SALIENCY)}, not {saliency!r}")


def best(score_BI: Tensor, valid_BI: Tensor, num_keep_B: Tensor) -> Tensor:
    """The real tokens with the `num_keep_B` highest scores, bool [B,I]; of equals the first."""
    return valid_BI & (rank(score_BI.masked_fill(~valid_BI, -torch.inf)) < num_keep_B[:, None])
