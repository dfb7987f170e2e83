"""VTW: withdraw all image tokens from a layer of the language model on.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid
Inference", AAAI 2025, arXiv 2405.05803.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from pumer.reducers.base import ModelShape
from pumer.reducers.registry import register
from pumer.reducers.simple import NoVision


@register
@dataclass(frozen=True)
class VTW(NoVision):
    """Drop the whole image after some layers: a baseline without selection.

    Args:
        layer: the first layer that runs without image tokens. None: half of the layers run with
            them. The paper selects it on a calibration set; `pumer tune` compares several values.

    Example:
        >>> llava = pumer.apply(llava, pumer.VTW())
        >>> [image for _, image in pumer.report(llava).lengths]  # before and after every layer
        [16, 16, 0, 0, 0]
    """

    name = "vtw"
    layer: int | None = None
    layer_offset = 1

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 1:
            raise ValueError(
                f"the layers before run with the image, so layer is at least 1, not {self.layer}: "
                "for no image at all, use no-vision"
            )

    def resolve(self, model: ModelShape) -> Self:
        return self if self.layer else replace(self, layer=max(1, model.depth // 2))

    @property
    def layers(self) -> tuple[int, ...] | None:  # type: ignore[override]
        return None if self.layer is None else (self.layer - 1,)
