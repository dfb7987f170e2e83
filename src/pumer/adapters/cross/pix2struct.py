"""Pix2Struct (Lee et al., 2023) as transformers has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.family import grids_of_flattened
from pumer.adapters.cross.reader import Inputs
from pumer.adapters.cross.writer import WriterAdapter
from pumer.reducers.tokens import Grid


@register
class Pix2StructAdapter(WriterAdapter):
    """Patches of any image in any grid, padded to one number; questions are drawn onto it."""

    family = "Pix2Struct"
    classes: ClassVar[tuple[str, ...]] = ("Pix2StructForConditionalGeneration",)
    padded = True

    def readers(self, model: Any) -> list[nn.Module]:
        return [model.decoder]

    def vision(self, model: Any) -> Any:
        return model.encoder

    def tower_attention(self, model: nn.Module) -> Any:
        return self.vision(model).encoder.layer[-1].attention

    def default_grid(self, model: nn.Module) -> Grid:
        side = math.isqrt(config_of(model).vision_config.seq_len)
        return side, side

    def grids(
        self, model: nn.Module, token_rows: Sequence[Tensor], inputs: Inputs
    ) -> list[Grid | None]:
        return grids_of_flattened(token_rows, inputs)
