"""SmartTrim: trained trimmers decide per sample which tokens and attention heads to keep.

Wang, Chen, Zhou, Zhu, et al., "SmartTrim: Adaptive Tokens and Attention Pruning for Efficient
Vision-Language Models", LREC-COLING 2024. Its code was never published. From the paper are: light
trimmers in every layer that see the other modality's summary, for tokens and for heads; a loss on
the cost; self-distillation; a curriculum. How they are built is reconstructed: the shape of the
trimmers, the straight-through Gumbel decisions and their fading noise, the form of the loss, and
that tokens leave between attention and MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from pumer.reducers.base import ModelShape, Traits, check_layers
from pumer.reducers.learned import (
    GumbelSampling,
    KeepDecision,
    Learned,
    decide,
    init_keep_bias,
    keep_surest,
    mean_of,
)
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import Tokens, TokenShape

_ATTENTION = 1 / 3
"""Share of attention in the cost of a layer: four width x width products, to the MLP's eight."""
_OPEN = 0.9
"""Share of the tokens left after all layers at the start of training."""


@register
@dataclass(frozen=True)
class SmartTrim(Learned):
    """Prune the tokens of both modalities, and the attention heads, that trained trimmers select in
    each sample.

    The number of tokens depends on the sample; a batch is as long as its longest sample. Pruned
    heads save no computation: they are multiplied by zero, because samples prune different heads.

    Args:
        target: mean cost of the trimming layers after training, as a share of the full cost. A
            layer costs a third of the tokens that enter it, times the share of its heads, plus two
            thirds of those that leave it.
        layers: layers that trim, counted from 0. None: all of the model's.
        text: trim text tokens too.
        heads: prune attention heads too.
        weight: of the budget loss; the task's loss has weight 1.
        curriculum: share of the training in which the target falls from 1.
        temperature: of the decisions at the start of training; it is halved by the end.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.SmartTrim(target=0.5))
        >>> sorted(pumer.active(model).parts["0"])  # what it trains in the first layer
        ['image', 'joint', 'text']
    """

    name = "smarttrim"
    target: float = 0.5
    layers: tuple[int, ...] | None = None  # type: ignore[assignment]
    text: bool = True
    heads: bool = True
    weight: float = 2.0
    curriculum: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(
                f"target is a share of the cost above 0 and up to 1, not {self.target}"
            )
        if not 0 <= self.curriculum <= 1:
            raise ValueError(
                f"curriculum is a share of the training, 0 to 1, not {self.curriculum}"
            )
        if self.layers is None:
            return
        object.__setattr__(self, "layers", check_layers(self.layers))
        if min(self.layers, default=0) < 0:
            raise ValueError("SmartTrim trims in layers, which are counted from 0")

    def resolve(self, model: ModelShape) -> Self:
        return (
            self if self.layers is not None else replace(self, layers=tuple(range(model.last + 1)))
        )

    @property
    def traits(self) -> Traits:
        return replace(super().traits, dynamic_length=True)

    @property
    def trims_heads(self) -> bool:
        return self.heads

    @property
    def self_distils(self) -> bool:
        return True

    def parts(self, width: int, heads: int, depth: int, has_cross_attention: bool) -> nn.ModuleDict:
        attentions = (
            ("text_self", "text_cross", "image_self", "image_cross")
            if has_cross_attention
            else ("joint",)
        )
        assert self.layers is not None
        each = _OPEN ** (1 / max(len(self.layers), 1))
        margin = math.log(each / (1 - each))
        layers = {}
        for layer in self.layers:
            trimmers: dict[str, nn.Module] = {"image": TokenTrimmer(width, margin)}
            if self.text:
                trimmers["text"] = TokenTrimmer(width, margin)
            if self.heads:
                trimmers |= {name: HeadTrimmer(width, heads, margin) for name in attentions}
            layers[str(layer)] = nn.ModuleDict(trimmers)
        return nn.ModuleDict(layers)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        """The upper bound: all tokens."""
        return shape.unchanged

    def plan(self, tokens: Tokens) -> Plan:
        keep_BN = self._keep(tokens, None).bool() & tokens.valid_BN
        text, image = (
            keep_BN[:, tokens.num_prefix_tokens : tokens.text],
            keep_BN[:, tokens.text + tokens.num_prefix_tokens :],
        )
        return tokens.with_structure(
            Plan.keep(text, text.shape[1]) if self.text else None, Plan.keep(image, image.shape[1])
        )

    def gate(self, tokens: Tokens) -> KeepDecision:
        before_BN = tokens.mask_BN.float() if tokens.gate_BN is None else tokens.gate_BN
        after_BN = self._keep(tokens, self.sampling_at(tokens.progress)) * before_BN
        shares = [mean_of(gate_BN, tokens.valid_BN) for gate_BN in (before_BN, after_BN)]
        return KeepDecision(after_BN, torch.stack(shares, dim=-1))

    def budget_loss(
        self, keep_ratios: Sequence[Tensor], progress: float, heads: Sequence[Tensor] = ()
    ) -> Tensor:
        """Distance of the batch's mean cost from the target, which falls during the curriculum.

        Args:
            keep_ratios: share of the tokens before and after each layer's decision, [B,2].
            progress: of the training, 0 to 1.
            heads: share of the heads that every attention kept, [B].
        """
        shares = torch.stack(list(keep_ratios), dim=1)
        kept_heads = torch.stack(list(heads), dim=1).mean(1) if heads else 1.0
        cost_B = _ATTENTION * shares[..., 0].mean(1) * kept_heads + (1 - _ATTENTION) * shares[
            ..., 1
        ].mean(1)
        done = min(progress / self.curriculum, 1.0) if self.curriculum else 1.0
        return self.weight * (cost_B.mean() - (1 - done * (1 - self.target))).abs()

    def sampling_at(self, progress: float) -> GumbelSampling:
        """Full noise while the target falls, then fading until decisions are those of evaluation.

        Noise that faded from the start would work against the target: noise alone drops some tokens
        in each layer, so less of it keeps more tokens while fewer are wanted.
        """
        noise = min(1.0, (1 - progress) / max(1 - self.curriculum, 1e-9))
        return GumbelSampling(self.temperature * (1 - 0.5 * progress), noise)

    def _keep(self, tokens: Tokens, sampling: GumbelSampling | None) -> Tensor:
        """Decisions [B,N]; structure tokens always stay, and at least one image token."""
        assert tokens.states_BND is not None
        assert isinstance(tokens.part, nn.ModuleDict)
        states, text, num_prefix_tokens = tokens.states_BND, tokens.text, tokens.num_prefix_tokens
        there_BN = tokens.valid_BN if tokens.gate_BN is None else tokens.gate_BN > 0
        kept = []
        for name, start, stop, other in (
            ("text", 0, text, text),
            ("image", text, states.shape[1], 0),
        ):
            head = states.new_ones(
                len(states), min(num_prefix_tokens, stop - start), dtype=torch.float32
            )
            if name in tokens.part:
                # The summary is [CLS] of the other modality; zeros if no image token is left.
                summary = (
                    states[:, other] if other < states.shape[1] else torch.zeros_like(states[:, 0])
                )
                logits = tokens.part[name](states[:, start + num_prefix_tokens : stop], summary)
                decided = decide(logits, sampling)
                if name == "image":
                    decided = keep_surest(
                        decided, logits, there_BN[:, start + num_prefix_tokens : stop]
                    )
                kept += [head, decided]
            else:
                kept.append(states.new_ones(len(states), stop - start, dtype=torch.float32))
        return torch.cat(kept, dim=1)


class TokenTrimmer(nn.Module):
    """Logits of (keep, drop) for every token, from its state and a summary of the other modality.

    Args:
        width: channels of a token.
        margin: initial difference of the two logits.
    """

    def __init__(self, width: int, margin: float) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width // 4)
        self.decision = nn.Linear(width // 4, 2)
        init_keep_bias(self.decision, margin)

    def forward(self, states_BND: Tensor, other_BD: Tensor) -> Tensor:
        other = self.other_norm(other_BD)[:, None].expand_as(states_BND)
        hidden = nn.functional.gelu(self.inner(torch.cat([self.norm(states_BND), other], dim=-1)))
        logits: Tensor = self.decision(hidden)
        return logits


class HeadTrimmer(nn.Module):
    """Head-pruning mask of an attention, [B,H], from the mean states of its queries and its keys.

    Args:
        width: channels of a token.
        heads: of the attention.
        margin: as in `TokenTrimmer`.
    """

    def __init__(self, width: int, heads: int, margin: float) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width // 4)
        self.decisions = nn.Linear(width // 4, 2 * heads)
        init_keep_bias(self.decisions, margin)

    def forward(
        self, queries_BD: Tensor, keys_BD: Tensor, sampling: GumbelSampling | None
    ) -> Tensor:
        pooled = torch.cat([self.norm(queries_BD), self.other_norm(keys_BD)], dim=-1)
        hidden = nn.functional.gelu(self.inner(pooled))
        logits = self.decisions(hidden).unflatten(-1, (-1, 2))
        mask_BH = decide(logits, sampling)
        # At least one head is kept: the one with the largest margin.
        surest = (logits[..., 0] - logits[..., 1]).argmax(1, keepdim=True)
        # The added head has no gradient, so that decisions keep theirs.
        pruned_BH = (1 - mask_BH).detach()
        return mask_BH + pruned_BH * torch.zeros_like(mask_BH).scatter(1, surest, 1.0)
