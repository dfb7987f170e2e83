"""E-AdaPrune: the number of tokens from the image's spectrum, the tokens by any method.

He and Chen, "Energy-Driven Adaptive Visual Token Pruning" (E-AdaPrune), 2026, arXiv 2603.05950.
Reconstructed from its abstract and from follow-up work; the features and the bounds are our choice.

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
    """Keep as many image tokens as directions hold a share of the spectral energy of their states.

    On CUDA the eigendecomposition needs one host-device sync.

    Args:
        selector: the method that selects the tokens; its own `keep` is ignored.
        tau: share of the energy (squared singular values) to hold; `matched` finds the one that
            keeps a given number on average.
        least: lower bound of the number: a share of the image's tokens (float), or a number (int).
        most: upper bound, likewise.

    Example:
        >>> llava = pumer.apply(llava, pumer.Energy(pumer.DivPrune(), tau=0.99, most=0.5))
        >>> pumer.report(llava).lengths[-1]  # (text, image) tokens after the last layer
        (64, 8)
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
        # The spectrum sets the number of tokens of every image, the selector chooses them.
        num_keep_B = self.count(energies(image_states(tokens)), valid_BI.sum(1))
        image = self.selector.reduce_to(tokens, num_keep_B, num_keep(self.most, valid_BI.shape[1]))
        return tokens.with_structure(None, image)

    def count(self, energy_BR: Tensor, count_B: Tensor) -> Tensor:
        """How many tokens of each image to keep, int64 [B], from its energies and token count."""
        wanted_B = directions_for(self.tau, energy_BR)
        return torch.minimum(
            torch.maximum(wanted_B, num_keep(self.least, count_B)), num_keep(self.most, count_B)
        )

    def matched(self, spectra: Sequence[tuple[Tensor, Tensor]], keep: float | int) -> Energy:
        """This reducer with the `tau` that keeps, on average over these images, as many tokens as a
        fixed `keep`, for a comparison at equal budgets (the paper's protocol).

        Args:
            spectra: for every batch of a calibration set the energies [B,R] and the numbers of
                image tokens [B]; `EnergyCalibrator` collects them.
            keep: the fixed budget.

        Raises:
            ValueError: if there are no images, or no `tau` within the bounds comes within one
                token of the budget.
        """
        if not spectra:
            raise ValueError("give the spectra of some images")
        target = torch.cat([num_keep(keep, count) for _, count in spectra]).double().mean()

        def excess(tau: float) -> float:
            counts = torch.cat([replace(self, tau=tau).count(*spectrum) for spectrum in spectra])
            return float(counts.double().mean() - target)

        # Bisection over x in tau = 1 - 10 ** -x: useful values are close to 1.
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
    """Calibration of `Energy`: reduces nothing, and collects the spectra for `Energy.matched`.

    Apply it to a model and run typical images through.

    Args:
        layers: where `Energy` will act.
        noted: the energies [B,R] and numbers of image tokens [B] of every batch.

    Example:
        >>> from pumer.reducers import EnergyCalibrator
        >>> calibrator = EnergyCalibrator()
        >>> llava = pumer.apply(llava, calibrator)
        >>> # run typical images through, then: pumer.Energy().matched(calibrator.noted, keep=0.25)
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
