"""What reducers with trained parts share: decisions that gradients can pass while training, and
their price.

While training every token stays, and attention leaves out those that are decided against; so a
decision can be learned. Afterwards the tokens really go. Training therefore costs as much as
without reduction, and a little more.

Shape suffixes: B batch, N tokens, H heads, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumer.reducers.base import Reducer, Traits
from pumer.reducers.tokens import Tokens


@dataclass(frozen=True)
class KeepDecision:
    """What a learned reducer decides while training.

    Args:
        token_BN: 1 for tokens that stay, 0 for others; its gradient is that of the soft decision
            (straight-through).
        keep_ratios: what `Learned.budget_loss` wants to know of this layer, per sample.
    """

    token_BN: Tensor
    keep_ratios: Tensor


@dataclass(frozen=True)
class GumbelSampling:
    """How decisions are drawn while training.

    Args:
        temperature: of the soft decisions, whose gradients the drawn ones have.
        noise: share of the Gumbel noise; without any the likelier decision is drawn, as it is
            afterwards.
    """

    temperature: float = 1.0
    noise: float = 1.0


@dataclass(frozen=True)
class Learned(Reducer):
    """A reducer that decides by trained parts."""

    @property
    def traits(self) -> Traits:
        return Traits(learned=self)

    @property
    def trims_heads(self) -> bool:
        """Whether it decides on attention heads too."""
        return False

    def sampling_at(self, progress: float) -> GumbelSampling:
        """How decisions are drawn at this point of the training, 0 to 1."""
        return GumbelSampling()

    @property
    def self_distils(self) -> bool:
        """Whether the model's own answer without reduction is to teach the reduced one."""
        return False

    def parts(self, width: int, heads: int, depth: int, has_cross_attention: bool) -> nn.ModuleDict:
        """New parts, by layer.

        Args:
            width: channels of the states.
            heads: of every attention.
            depth: number of layers.
            has_cross_attention: see `Adapter.has_cross_attention`.
        """
        raise NotImplementedError

    def gate(self, tokens: Tokens) -> KeepDecision:
        """The decisions in one layer while training; `tokens.gate_BN` has those of the layers
        before."""
        raise NotImplementedError

    def budget_loss(
        self, keep_ratios: Sequence[Tensor], progress: float, heads: Sequence[Tensor] = ()
    ) -> Tensor:
        """What is to be paid for keeping more, or fewer, tokens than wanted.

        Args:
            keep_ratios: `KeepDecision.keep_ratios` of every layer that decided.
            progress: of the training, 0 to 1.
            heads: share of the heads that every attention kept, [B], where heads are trimmed.
        """
        raise NotImplementedError


def decide(logits: Tensor, sampling: GumbelSampling | None) -> Tensor:
    """Keep (1) or not (0) from logits [..., (keep, drop)].

    While training one is drawn by the straight-through Gumbel trick (Jang et al., ICLR 2017); the
    likelier one is taken where nothing is drawn.
    """
    if sampling is None:
        return (logits[..., 0] > logits[..., 1]).float()
    gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    soft = ((logits.float() + sampling.noise * gumbel) / sampling.temperature).softmax(-1)[..., 0]
    return (soft > 0.5).float() + soft - soft.detach()


def keep_surest(keep_BN: Tensor, logits: Tensor, there_BN: Tensor) -> Tensor:
    """The decisions, but where they leave none of the tokens that are there, the surest of these
    stays.

    Args:
        keep_BN: what `decide` made of the logits.
        logits: [B,N,(keep, drop)].
        there_BN: bool, tokens that are real and not gone already.
    """
    if keep_BN.shape[1] == 0:
        return keep_BN
    margin_BN = (logits[..., 0] - logits[..., 1]).masked_fill(~there_BN, -torch.inf)
    surest_BN = torch.zeros_like(keep_BN).scatter(1, margin_BN.argmax(1, keepdim=True), 1.0)
    none_B1 = ~(keep_BN.bool() & there_BN).any(1, keepdim=True)
    # What is added has no gradient, so that every decision keeps its own.
    return keep_BN + (none_B1 & there_BN) * surest_BN * (1 - keep_BN).detach()


def mean_of(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over the real tokens, [B]."""
    weights = mask_BN.to(values_BN.dtype)
    return (values_BN * weights).sum(1) / weights.sum(1).clamp_min(1)


def init_keep_bias(last: nn.Linear, bias: float) -> None:
    """Let decisions, each of two logits in turn, begin as keeping: the logits start about `bias`
    apart."""
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(torch.tensor([bias, 0.0]).repeat(last.out_features // 2))
