"""Diffusion Gemma (Gemma Team, 2026) as transformers has it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pumer.adapters.base import Patch, register
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.any_size import AnySizeAdapter
from pumer.adapters.decoder.attention import slice_attention_mask
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.gemma4 import Gemma4Adapter
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import VisionCapture


@register
class DiffusionGemmaAdapter(Gemma4Adapter):
    """A language model reads the prompt, and is reduced; another one, which writes whole blocks by
    diffusion, reads what the cache has of it. Costs are those of reading."""

    family = "Diffusion Gemma"
    classes: ClassVar[tuple[str, ...]] = ("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaModel")
    key_layers = DecoderAdapter.key_layers

    def _writer(self, model: Any) -> Any:
        return (model.model if hasattr(model, "lm_head") else model).decoder

    def trunk(self, model: Any) -> Any:
        model = getattr(model, "model", model)
        return getattr(model, "encoder", model)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        lengths = [rows * columns for rows, columns in self.token_grids(trunk, captured)]
        features = output.pooler_output.flatten(0, -2).split(lengths)
        output = BaseModelOutputWithPooling(pooler_output=features)
        return super().image_spans(trunk, output, captured)

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        AnySizeAdapter.install(self, patch, model, capture)
        writer = self._writer(model)
        for layer_index, layer in enumerate(writer.layers):
            cut = partial(_cut_mask, writer, layer_index)
            patch.hook(layer.register_forward_pre_hook(cut, with_kwargs=True))


def _cut_mask(writer: Any, layer_index: int, _: nn.Module, args: Any, kwargs: Any) -> Any:
    """Before a layer that writes: its mask for the tokens that the cache has. All of a block see
    each other and, in a layer with a window, the end of the prompt."""
    cache, states_BQD = kv_cache.find(kwargs), args[0]
    held = kv_cache.layout(cache, layer_index)
    if held is None:
        return None
    batch, queries, _ = states_BQD.shape
    layer, past = cache.layers[layer_index], cache.get_seq_length()
    block_BQ = torch.arange(past, past + queries, device=states_BQD.device).expand(batch, -1)
    position_BL, filled_BL = kv_cache.with_cached(
        held, past, kv_cache.num_held(layer), block_BQ, None
    )
    _, offset = layer.get_mask_sizes(queries)
    mask: Tensor | None = kwargs["attention_mask"]
    if mask is None:
        mask = states_BQD.new_ones(batch, 1, queries, past + queries - offset, dtype=torch.bool)
    backend = writer.config.get_text_config()._attn_implementation
    arguments = position_BL, filled_BL, offset, past, queries, backend, states_BQD.dtype
    return args, kwargs | {"attention_mask": slice_attention_mask(mask, None, *arguments)}
