"""transformers' VisionEncoderDecoderModel: TrOCR, Donut, Nougat and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross.writer import WriterAdapter, macs_of_run
from pumer.adapters.decoder.parts import side_length
from pumer.reducers.tokens import Grid


@register
class VisionEncoderDecoderAdapter(WriterAdapter):
    """Any encoder and any decoder, of which nothing is read but the tokens between them."""

    family = "vision encoder-decoder"
    classes: ClassVar[tuple[str, ...]] = ("VisionEncoderDecoderModel",)
    reads_tower = False

    def readers(self, model: Any) -> list[nn.Module]:
        return [model.decoder]

    def before(self, model: Any) -> int:
        embeddings = getattr(model.encoder, "embeddings", None)
        names = ("cls_token", "distillation_token")
        return sum(getattr(embeddings, name, None) is not None for name in names)

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).encoder
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        # Every stage of a Swin but the first takes squares of two by two to one token.
        shrinks = side_length(vision.patch_size) << len(getattr(vision, "depths", [0])) - 1
        return height // shrinks, width // shrinks

    def tower_shape(self, model: Any) -> tuple[int, int, int]:
        return 0, model.encoder.config.hidden_size, 1

    def memory_width(self, model: Any) -> int:
        projection = getattr(model, "enc_to_dec_proj", None)
        width: int = model.encoder.config.hidden_size
        return width if projection is None else projection.out_features

    def vision_macs(self, model: Any, image: int, tower: Sequence[int] = ()) -> tuple[int, int]:
        vision = model.encoder.config
        size = vision.image_size
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        return macs_of_run(model.encoder, 1, vision.num_channels, *sides), 0
