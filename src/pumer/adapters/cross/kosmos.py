"""Kosmos-2 (Peng et al., 2023) and Kosmos-2.5 (Lv et al., 2023) as transformers has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.family import CrossAdapter, grids_of_flattened
from pumer.adapters.cross.reader import Inputs
from pumer.reducers.tokens import Grid


@register
class Kosmos2Adapter(CrossAdapter):
    """Latent queries look at an image and at themselves, and are what the language model gets."""

    family = "Kosmos-2"
    classes: ClassVar[tuple[str, ...]] = ("Kosmos2ForConditionalGeneration", "Kosmos2Model")
    mask = "attention_mask"
    wide_mask = True
    crossing = ()

    def readers(self, model: Any) -> list[nn.Module]:
        return [model.image_to_text_projection.x_attn]

    def scopes(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(model, "get_image_features")]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return self.readers(model)

    def projector(self, model: Any) -> nn.Module:
        projector: nn.Module = model.image_to_text_projection.dense
        return projector

    def writer(self, model: nn.Module) -> Any:
        return self.language(model)

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def behind(self, model: nn.Module) -> int:
        queries: int = config_of(model).latent_query_num
        return queries

    def memory_width(self, model: nn.Module) -> int:
        width: int = config_of(model).text_config.embed_dim
        return width

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        _, image = super().default_lengths(model)
        return self.behind(model), image

    def text_length(self, model: nn.Module, inputs: Inputs) -> int:
        return self.behind(model)


@register
class Kosmos25Adapter(Kosmos2Adapter):
    """The same for images of any size, whose patches are padded to one number."""

    family = "Kosmos-2.5"
    classes: ClassVar[tuple[str, ...]] = ("Kosmos2_5ForConditionalGeneration", "Kosmos2_5Model")
    reads_tower = False

    def has_class_token(self, model: nn.Module) -> bool:
        return False

    def default_grid(self, model: nn.Module) -> Grid:
        side = math.isqrt(config_of(model).vision_config.max_num_patches)
        return side, side

    def real(self, memory_BLD: Tensor, mask: Any, inputs: Inputs) -> Tensor | None:
        # As the tower finds its padding.
        real_BI = inputs["flattened_patches"].sum(-1) != 0
        queries = memory_BLD.shape[1] - real_BI.shape[1]
        return nn.functional.pad(real_BI, (0, queries), value=True)

    def grids(
        self, model: nn.Module, token_rows: Sequence[Tensor], inputs: Inputs
    ) -> list[Grid | None]:
        return grids_of_flattened(token_rows, inputs)
