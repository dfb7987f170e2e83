"""Baselines that any method has to beat.

Random and uniform selection ignore the tokens; pooling uses their positions only; `NoVision` shows
what the text alone achieves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumer.reducers.base import Reducer, Traits, check_layers, check_ratios
from pumer.reducers.ops.budget import remaining
from pumer.reducers.ops.matching import rank
from pumer.reducers.plan import Plan
from pumer.reducers.registry import register
from pumer.reducers.tokens import EMBEDDINGS, Tokens, TokenShape


@register
@dataclass(frozen=True)
class Unreduced(Reducer):
    """Reduce nothing: the baseline with fused attention and trimmed padding.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.Unreduced())
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 145)
    """

    name = "none"

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return shape.unchanged

    def plan(self, tokens: Tokens) -> Plan:
        return Plan.identity(tokens.mask_BN)


@dataclass(frozen=True)
class _Selection(Reducer):
    """Keep a share of the image tokens, at least one, by their position alone."""

    prune: float = 0.5
    layers: tuple[int, ...] = (EMBEDDINGS,)

    def __post_init__(self) -> None:
        check_ratios(prune=self.prune)
        object.__setattr__(self, "layers", check_layers(self.layers))

    @property
    def traits(self) -> Traits:
        return Traits(needs_qk=False)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if shape.layer not in self.layers:
            return shape.unchanged
        return shape.text, shape.structure + remaining(self.prune, shape.patches)

    def plan(self, tokens: Tokens) -> Plan:
        valid_BN = tokens.valid_BN[:, tokens.text + tokens.num_prefix_tokens :]
        num_keep_B1 = remaining(self.prune, valid_BN.sum(1, keepdim=True))
        keep_BN = valid_BN & self._select(valid_BN, num_keep_B1, tokens.layer)
        return tokens.with_structure(
            None, Plan.keep(keep_BN, remaining(self.prune, valid_BN.shape[1]))
        )

    def _select(self, valid_BN: Tensor, num_keep_B1: Tensor, layer: int) -> Tensor:
        raise NotImplementedError


@register
@dataclass(frozen=True)
class Random(_Selection):
    """Prune image tokens at random, the same ones for every sample.

    Args:
        prune: share of the image tokens to prune at each layer.
        layers: layers that reduce; -1 is before the first.
        seed: of the random order.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.Random(prune=0.5))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 73)
    """

    name = "random"
    seed: int = 0

    def _select(self, valid_BN: Tensor, num_keep_B1: Tensor, layer: int) -> Tensor:
        # A hash of the position instead of a generator: stateless, and independent of the batch.
        position = torch.arange(valid_BN.shape[1], device=valid_BN.device)
        hashed = (position + 1) * 0x9E3779B1 + (self.seed * 64 + layer + 2) * 0x85EBCA6B
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            hashed = ((hashed ^ (hashed >> shift)) * factor) & 0xFFFFFFFF
        score = (hashed ^ (hashed >> 15)).double().expand(valid_BN.shape)
        return rank(score.masked_fill(~valid_BN, -1.0)) < num_keep_B1


@register
@dataclass(frozen=True)
class Uniform(_Selection):
    """Keep evenly spaced image tokens in raster order.

    Args:
        prune: share of the image tokens to prune at each layer.
        layers: layers that reduce; -1 is before the first.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.Uniform(prune=0.5))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 73)
    """

    name = "uniform"

    def _select(self, valid_BN: Tensor, num_keep_B1: Tensor, layer: int) -> Tensor:
        position = torch.arange(valid_BN.shape[1], device=valid_BN.device)
        real_B1 = valid_BN.sum(1, keepdim=True).clamp_min(1)
        return (position + 1) * num_keep_B1 // real_B1 > position * num_keep_B1 // real_B1


@register
@dataclass(frozen=True)
class Pool(Reducer):
    """Average the patches of every window of the image, edge windows included.

    Args:
        window: patches on a side of a window.
        layer: the layer that reduces; -1 is before the first.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.Pool(window=2))
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 37)
    """

    name = "pool"
    window: int = 2
    layer: int = EMBEDDINGS

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"a window has at least one patch on a side, not {self.window}")
        check_layers([self.layer])

    @property
    def traits(self) -> Traits:
        return Traits(needs_qk=False, needs_grid=True)

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        if shape.layer != self.layer:
            return shape.unchanged
        side = round(shape.patches**0.5)
        rows, columns = shape.grid or (side, side)
        # At most one window per patch: a batch of small images may be cut short of its grid.
        return shape.text, shape.structure + min(self._windows(rows, columns), shape.patches)

    def plan(self, tokens: Tokens) -> Plan:
        if tokens.grid is None or tokens.patch_BN is None:
            raise ValueError(
                "pooling needs all patches of the image: let it be the first to reduce"
            )
        # The window of every patch, counted in raster order.
        rows, columns = tokens.grid
        windows = self._windows(rows, columns)
        across = -(-columns // self.window)
        first = tokens.text + tokens.num_prefix_tokens
        valid_BN, patch_BN = tokens.valid_BN[:, first:], tokens.patch_BN[:, first:]
        window_BN = patch_BN // columns // self.window * across + patch_BN % columns // self.window
        window_BN = torch.where(valid_BN, window_BN, windows)

        # A window without a real patch gets no slot, so that padding does not change the result.
        used_BW = torch.zeros(
            valid_BN.shape[0], windows + 1, device=valid_BN.device, dtype=torch.int64
        )
        used_BW = used_BW.scatter(1, window_BN, torch.ones_like(window_BN))[:, :windows]
        slot_BW = torch.nn.functional.pad(used_BW.cumsum(1) - 1, (0, 1), value=-1)
        slots = min(windows, valid_BN.shape[1])
        mask_BK = torch.arange(slots, device=valid_BN.device) < used_BW.sum(1, keepdim=True)
        return tokens.with_structure(
            None, Plan.merge(slot_BW.gather(1, window_BN), mask_BK, tokens.sizes_BN[:, first:])
        )

    def _windows(self, rows: int, columns: int) -> int:
        return -(-rows // self.window) * -(-columns // self.window)


@register
@dataclass(frozen=True)
class NoVision(Reducer):
    """Drop the whole image before the first layer: what the text alone is worth.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), pumer.NoVision())
        >>> pumer.report(model).lengths[-1]  # (text, image) tokens after the last layer
        (40, 0)
    """

    name = "no-vision"

    @property
    def traits(self) -> Traits:
        return Traits(needs_qk=False, drops_image=True)

    @property
    def layers(self) -> tuple[int, ...]:
        return (EMBEDDINGS,)

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return (shape.text, 0) if self.reduces_at(shape.layer) else shape.unchanged

    def plan(self, tokens: Tokens) -> Plan:
        count = tokens.mask_BN.shape[1]
        index_BK = torch.arange(tokens.text, device=tokens.mask_BN.device).expand(
            len(tokens.mask_BN), -1
        )
        text = Plan.select(index_BK, torch.ones_like(index_BK, dtype=torch.bool), count)
        return replace(text, mask_BK=tokens.mask_BN[:, : tokens.text])
