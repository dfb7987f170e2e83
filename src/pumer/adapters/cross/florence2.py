"""Florence-2 (Xiao et al., 2023) as transformers has it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import Patch, register
from pumer.adapters.cross.encoder_decoder import EncoderDecoderAdapter
from pumer.adapters.cross.reader import bind
from pumer.adapters.cross.writer import macs_of_run
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.costs import linear_weights
from pumer.adapters.decoder.family import one_span_each
from pumer.adapters.decoder.hooks import DecoderHooks
from pumer.adapters.decoder.prompt import ForwardState, ImageSpan, enter_state
from pumer.reducers.tokens import Grid

DEFAULT_GRID = (24, 24)
"""Rows and columns of patches of an image of 768 pixels on a side."""
PREPARE = "_maybe_prepare_encoder_kwargs_for_generation"


@register
class Florence2Adapter(EncoderDecoderAdapter):
    """BART with the features of an image before the words. The first of them is the mean of all the
    others, so it is no patch."""

    family = "Florence-2"
    classes: ClassVar[tuple[str, ...]] = ("Florence2ForConditionalGeneration", "Florence2Model")
    reads_tower = False

    def language(self, model: nn.Module) -> Any:
        return self.trunk(model).language_model.encoder

    def writer(self, model: nn.Module) -> Any:
        return self.trunk(model).language_model.decoder

    def start(self, patch: Patch, model: nn.Module) -> DecoderHooks:
        hooks = super().start(patch, model)
        if hasattr(model, PREPARE):
            patch.wrap(model, PREPARE, _prepare, hooks, inspect.signature(getattr(model, PREPARE)))
        return hooks

    def default_grid(self, model: nn.Module) -> Grid:
        return DEFAULT_GRID

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        grid = tuple(output.last_hidden_state.shape[-2:])
        structure = output.pooler_output.new_zeros(output.pooler_output.shape[1]).bool().cpu()
        structure[0] = True
        return one_span_each(output.pooler_output, grid, {}, structure)

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        vision, patch = self.vision(model).config, math.prod(self.vision(model).config.patch_stride)
        sides = (side * patch for side in DEFAULT_GRID)
        tower_macs = macs_of_run(self.vision(model), 1, vision.in_channels, *sides)
        return tower_macs, image * linear_weights(self.projector(model))


def _prepare(
    model: Any,
    stock: Callable[..., Any],
    hooks: DecoderHooks,
    signature: inspect.Signature,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of the step of `generate` that runs the tower and the encoder outside of any
    `forward`."""
    arguments = bind(signature, args, kwargs)
    ids, inputs = arguments["inputs_tensor"], dict(arguments["model_kwargs"])
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        inputs["input_ids"] = ids
    with enter_state(ForwardState(hooks, call_kwargs=inputs)) as state:
        hooks.begin(state, inputs)
        return stock(*args, **kwargs)
