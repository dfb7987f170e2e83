"""E-AdaPrune: as many tokens as the image's spectrum asks for, chosen by any method.

He and Chen, "Energy-Driven Adaptive Visual Token Pruning" (E-AdaPrune), 2026, arXiv 2603.05950.
Reconstructed from its abstract and from what others built after it: which features, and the bounds,
are our choice.

Shape suffixes: B batch, I image tokens, R singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from pumer.reducers.base import ModelShape, Reducer, Traits
from pumer.reducers.divprune import DivPrune
from pumer.reducers.ops.budget import check_keep, num_keep
from pumer.reducers.ops.spectral import directions_for, energies
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register, to_dict
from pumer.reducers.selector import Selector, candidates, image_states
from pumer.reducers.tokens import Tokens, TokenShape


@register
@dataclass(frozen=True)
class Energy(Reducer):
    """Keep as many image tokens as directions are needed to hold a share of the spectral energy of
    their states.

    On CUDA the eigen-decomposition makes the host wait once.

    Args:
        selector: which tokens; its own `keep` is not asked.
        tau: share of the energy (squared singular values) to hold. `matched` finds the one that
            keeps a given number on average.
        least: lower bound of the number: a share of the image's tokens, or a whole number.
        most: upper bound, in the same way.
    """

    name = "energy"
    selector: Selector = field(default_factory=DivPrune)
    tau: float = 0.99
    least: float | int = 0.05
    most: float | int = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise ValueError(
                "selector can keep any number of image tokens, as DivPrune() can, not "
                f"{self.selector!r}"
            )
        if len(self.selector.layers or ()) != 1:
            raise ValueError(
                f"{self.selector.name} acts in several layers: one budget is for one reduction"
            )
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is a share between 0 and 1, not {self.tau}")
        check_keep(least=self.least, most=self.most)

    def resolve(self, model: ModelShape) -> Self:
        return replace(self, selector=self.selector.resolve(model))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.selector.layers

    @property
    def traits(self) -> Traits:
        return replace(self.selector.traits, dynamic_length=True, before_projector=False)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if not self.reduces_at(shape.layer):
            return shape.unchanged
        return shape.text, shape.structure + num_keep(self.most, shape.patches)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        if valid_BI.shape[1] == 0:
            return Plan.identity(tokens.mask_BN)
        num_keep_B = self.count(energies(image_states(tokens)), valid_BI.sum(1))
        image = self.selector.reduce_to(tokens, num_keep_B, num_keep(self.most, valid_BI.shape[1]))
        return tokens.with_structure(None, image)

    def count(self, energy_BR: Tensor, count_B: Tensor) -> Tensor:
        """How many tokens of each image stay, int64 [B], given its energies and how many it has."""
        wanted_B = directions_for(self.tau, energy_BR)
        return torch.minimum(
            torch.maximum(wanted_B, num_keep(self.least, count_B)), num_keep(self.most, count_B)
        )

    def matched(self, spectra: Sequence[tuple[Tensor, Tensor]], keep: float | int) -> Energy:
        """This with the `tau` that keeps, on average over these images, as many tokens as a fixed
        `keep` would.

        What it then keeps compares with the same selector at the fixed budget (the paper's
        protocol).

        Args:
            spectra: of every batch of a calibration set the energies [B,R] and the image tokens
                [B]; `EnergyCalibrator` collects them.
            keep: the fixed budget.

        Raises:
            ValueError: if no image is given, or no `tau` comes within one token of it: the bounds
                are in the way.
        """
        if not spectra:
            raise ValueError("give the spectra of some images")
        target = torch.cat([num_keep(keep, count) for _, count in spectra]).double().mean()

        def excess(tau: float) -> float:
            counts = torch.cat([replace(self, tau=tau).count(*spectrum) for spectrum in spectra])
            return float(counts.double().mean() - target)

        # Bisection over x in tau = 1 - 10 ** -x: what matters is close to 1.
        few, many = 0.01, 7.0
        for _ in range(40):
            middle = (few + many) / 2
            few, many = (middle, many) if excess(1 - 10**-middle) < 0 else (few, middle)
        tau = min(1 - 10**-few, 1 - 10**-many, key=lambda tau: abs(excess(tau)))
        if abs(excess(tau)) > 1:
            raise ValueError(
                f"no tau keeps {float(target):.1f} tokens on average: widen least and most"
            )
        return replace(self, tau=tau)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "selector": to_dict(self.selector)}


@dataclass(frozen=True)
class EnergyCalibrator(Reducer):
    """Calibration of `Energy`: changes nothing, and collects what `Energy.matched` takes.

    Put it on a model and run typical images through.

    Args:
        layers: where the energy rule is to act.
        noted: the energies [B,R] and numbers of image tokens [B] of every batch.
    """

    name = "energy-spectra"
    layers: tuple[int, ...] = (-1,)
    noted: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return shape.unchanged

    def plan(self, tokens: Tokens) -> Plan:
        valid_BI = candidates(tokens)
        if valid_BI.shape[1] > 0:
            self.noted.append((energies(image_states(tokens)), valid_BI.sum(1)))
        return Plan.identity(tokens.mask_BN)
