"""SmartTrim: trained trimmers decide per sample which tokens and which attention heads an example
needs.

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
"""Share of attention in the cost of a layer: four products of the width with itself, next to the
MLP's eight."""
_OPEN = 0.9
"""Share of the tokens that are left after all layers when training begins."""


@register
@dataclass(frozen=True)
class SmartTrim(Learned):
    """Drop the tokens of either modality, and silence the heads, that trained trimmers find
    needless in this sample.

    How many stay is decided sample by sample; a batch is as long as its longest. Silenced heads
    save nothing: they are computed and multiplied by zero, as every sample of a batch silences
    others.

    Args:
        target: share of the cost of the layers that trim, to be used on average once trained. A
            layer costs a third of the tokens that enter it, times the share of its heads, and two
            thirds of those that leave it.
        layers: layers that trim, counted from 0. None: all of the model's.
        text: trim text tokens too.
        heads: trim attention heads too.
        weight: of the loss on the cost, next to 1 for the task's.
        curriculum: share of the training in which the target goes down from 1.
        temperature: of the decisions while training, at its beginning; at its end half of that.
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
        """The most that may stay: everything."""
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
        """Distance of the batch's mean cost from the target, which goes down in the curriculum.

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
        """At random while the target goes down, then less and less, until the cost is that of the
        later decisions.

        Noise that faded from the start would do the trimmers' work the wrong way round: as each
        layer drops a little by chance, less of it alone leaves more tokens, while fewer are wanted.
        """
        noise = min(1.0, (1 - progress) / max(1 - self.curriculum, 1e-9))
        return GumbelSampling(self.temperature * (1 - 0.5 * progress), noise)

    def _keep(self, tokens: Tokens, sampling: GumbelSampling | None) -> Tensor:
        """Decisions [B,N]; structure tokens always stay, and one token of the image."""
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
                # An image that was dropped whole says nothing of the text.
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
        apart: by how much they begin as keeping.
    """

    def __init__(self, width: int, apart: float) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width // 4)
        self.decision = nn.Linear(width // 4, 2)
        init_keep_bias(self.decision, apart)

    def forward(self, states_BND: Tensor, other_BD: Tensor) -> Tensor:
        other = self.other_norm(other_BD)[:, None].expand_as(states_BND)
        hidden = nn.functional.gelu(self.inner(torch.cat([self.norm(states_BND), other], dim=-1)))
        logits: Tensor = self.decision(hidden)
        return logits


class HeadTrimmer(nn.Module):
    """Which heads of an attention are heard, [B,H], from the mean states of those who ask and those
    who are asked.

    Args:
        width: channels of a token.
        heads: of the attention.
        apart: as in `TokenTrimmer`.
    """

    def __init__(self, width: int, heads: int, apart: float) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width // 4)
        self.decisions = nn.Linear(width // 4, 2 * heads)
        init_keep_bias(self.decisions, apart)

    def forward(
        self, asking_BD: Tensor, asked_BD: Tensor, sampling: GumbelSampling | None
    ) -> Tensor:
        pooled = torch.cat([self.norm(asking_BD), self.other_norm(asked_BD)], dim=-1)
        hidden = nn.functional.gelu(self.inner(pooled))
        logits = self.decisions(hidden).unflatten(-1, (-1, 2))
        heard_BH = decide(logits, sampling)
        # One head is always heard: the surest one.
        surest = (logits[..., 0] - logits[..., 1]).argmax(1, keepdim=True)
        silent_BH = (
            1 - heard_BH
        ).detach()  # what is added has no gradient, so that every decision keeps its own
        return heard_BH + silent_BH * torch.zeros_like(heard_BH).scatter(1, surest, 1.0)
