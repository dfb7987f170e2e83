"""PP-FormulaNet (PaddlePaddle, 2025) as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.writer import WriterAdapter, macs_of_run
from pumer.adapters.decoder.parts import side_length
from pumer.reducers.tokens import Grid

SHRINKS = 4
"""Convolutions behind the tower take every square of patches of this side to one token."""


@register
class PPFormulaNetAdapter(WriterAdapter):
    """Most layers of the tower see windows, and its last two are convolutions."""

    family = "PP-FormulaNet"
    classes: ClassVar[tuple[str, ...]] = ("PPFormulaNetForConditionalGeneration",)
    reads_tower = False

    def readers(self, model: Any) -> list[nn.Module]:
        return [model.model.decoder]

    def vision(self, model: Any) -> Any:
        return model.model.encoder

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).vision_config
        side = side_length(vision.image_size) // side_length(vision.patch_size) // SHRINKS
        return side, side

    def memory_width(self, model: nn.Module) -> int:
        width: int = config_of(model).vision_config.decoder_hidden_size
        return width

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision = config_of(model).vision_config
        side = side_length(vision.image_size)
        return macs_of_run(self.vision(model), 1, vision.num_channels, side, side), 0
