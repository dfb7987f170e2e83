"""Inkling, Inkling 2 and its looped form (Thinking Machines, 2026) as transformers has them.

How far tokens lie apart is counted in tokens that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import ImageSpan, shift
from pumer.adapters.macs import linear_weights
from pumer.reducers.tokens import Grid


@register
class InklingAdapter(AnySizeAdapter):
    """Patches go through layers without attention one by one; which are of one image only the
    prompt says. Audio is left as it is."""

    family = "Inkling"
    classes: ClassVar[tuple[str, ...]] = ("InklingForConditionalGeneration", "InklingModel")
    renumbers = False  # there are no positions to be counted anew
    image_delimiters = (1, 0)
    placeholder_hook = None
    other_tokens = ("audio_token_id",)
    reads_tower = False

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).final_norm

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        return [ImageSpan(len(output.pooler_output))]

    def spans_in_prompt(
        self, images: list[ImageSpan], image_BS: Tensor, inputs: dict[str, Any]
    ) -> list[ImageSpan]:
        begins = (image_BS & ~shift(image_BS, 1))[image_BS]
        starts = begins.nonzero()[:, 0].tolist()
        ends = [*starts[1:], len(begins)]
        return [ImageSpan(end - start) for start, end in zip(starts, ends, strict=True)]

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision = self.vision(model)
        pixels = vision.scales[:, :3].prod(1).tolist()
        folded = zip(vision.encoder_layers, pixels[1:], strict=True)
        macs = sum(int(linear_weights(layer)) * pixels[-1] // size for layer, size in folded)
        return image * macs, 0


@register
class Inkling2Adapter(AnySizeAdapter):
    """Four patches make a token; the tower puts a [CLS] before every image."""

    family = "Inkling 2"
    classes: ClassVar[tuple[str, ...]] = (
        "Inkling2ForConditionalGeneration",
        "Inkling2Model",
        "Inkling2LoopForConditionalGeneration",
        "Inkling2LoopModel",
    )
    renumbers = False  # there are none to be counted anew
    image_delimiters = (1, 0)
    placeholder_hook = None
    other_tokens = ()

    def projector(self, model: nn.Module) -> nn.Module:
        return self.vision(model).merger

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def tower_prefix(self, model: nn.Module) -> int:
        return 1

    def token_grids(self, trunk: Any, captured: Captured) -> list[Grid]:
        return [(rows, columns) for _, rows, columns in captured.inputs["image_grid_thw"].tolist()]

    def passes(self, model: nn.Module) -> list[int]:
        config = config_of(model).get_text_config()
        first = getattr(config, "loop_layer_index_start", 0)
        looped = range(first, getattr(config, "loop_layer_index_end", 0))
        return [
            config.loop_num_passes if layer in looped else 1 for layer in range(self.depth(model))
        ]
