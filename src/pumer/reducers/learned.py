"""What reducers with trainable parts share: differentiable keep decisions, and their budget loss.

In training every token stays, and attention masks out those that are not kept, so that decisions
can be learned. In evaluation the tokens are removed. Training therefore costs slightly more than
without reduction.

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
    """What a learned reducer decides in one layer in training.

    Args:
        token_BN: 1 for tokens that stay, 0 for others, with the gradient of the soft decision
            (straight-through).
        keep_ratio: share of tokens that stay, per sample, for `Learned.budget_loss`.
    """

    token_BN: Tensor
    keep_ratio: Tensor


@dataclass(frozen=True)
class GumbelSampling:
    """How decisions are sampled in training.

    Args:
        temperature: of the soft decisions, which provide the gradients.
        noise: scale of the Gumbel noise; 0 takes the likelier decision, as in evaluation.
    """

    temperature: float = 1.0
    noise: float = 1.0


@dataclass(frozen=True)
class Learned(Reducer):
    """A reducer that decides by trainable parts."""

    @property
    def traits(self) -> Traits:
        return Traits(learned=self, needs_qk=False)

    @property
    def trims_heads(self) -> bool:
        """Whether it prunes attention heads too."""
        return False

    def sampling_at(self, progress: float) -> GumbelSampling:
        """How decisions are sampled at this progress of the training, 0 to 1."""
        return GumbelSampling()

    @property
    def self_distils(self) -> bool:
        """Whether the unreduced model is the teacher of the reduced one (self-distillation)."""
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
        """The decisions of one layer in training; `tokens.gate_BN` are those of the layers
        before."""
        raise NotImplementedError

    def budget_loss(
        self, keep_ratios: Sequence[Tensor], progress: float, heads: Sequence[Tensor] = ()
    ) -> Tensor:
        """The loss that holds the number of kept tokens at the budget.

        Args:
            keep_ratios: `KeepDecision.keep_ratio` of every reducing layer.
            progress: of the training, 0 to 1.
            heads: share of the heads that every attention keeps, [B], if heads are pruned.
        """
        raise NotImplementedError


def decide(logits: Tensor, sampling: GumbelSampling | None) -> Tensor:
    """Keep (1) or not (0) from logits [..., (keep, drop)].

    In training, sampled by straight-through Gumbel-softmax (Jang et al., ICLR 2017); else the
    likelier one.
    """
    if sampling is None:
        return (logits[..., 0] > logits[..., 1]).float()
    gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    soft = ((logits.float() + sampling.noise * gumbel) / sampling.temperature).softmax(-1)[..., 0]
    return (soft > 0.5).float() + soft - soft.detach()


def keep_surest(keep_BN: Tensor, logits: Tensor, there_BN: Tensor) -> Tensor:
    """The decisions, with at least one token kept per row: the one with the largest margin.

    Args:
        keep_BN: from `decide`.
        logits: [B,N,(keep, drop)].
        there_BN: bool, tokens that are real and were kept so far.
    """
    if keep_BN.shape[1] == 0:
        return keep_BN
    margin_BN = (logits[..., 0] - logits[..., 1]).masked_fill(~there_BN, -torch.inf)
    surest_BN = torch.zeros_like(keep_BN).scatter(1, margin_BN.argmax(1, keepdim=True), 1.0)
    none_B1 = ~(keep_BN.bool() & there_BN).any(1, keepdim=True)
    # The added token has no gradient, so that decisions keep theirs.
    return keep_BN + (none_B1 & there_BN) * surest_BN * (1 - keep_BN).detach()


def mean_of(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over the real tokens, [B]."""
    weights = mask_BN.to(values_BN.dtype)
    return (values_BN * weights).sum(1) / weights.sum(1).clamp_min(1)


def init_keep_bias(last: nn.Linear, bias: float) -> None:
    """Initialize a decision layer to keep: each pair of logits starts about `bias` apart."""
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(torch.tensor([bias, 0.0]).repeat(last.out_features // 2))
