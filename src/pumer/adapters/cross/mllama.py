"""Mllama, the Llama 3.2 Vision models (Meta, 2024), as transformers has it.

Shape suffixes: B samples, M images of each, T tiles of an image, P tokens of a tile, L = M * T * P.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import config_of, register
from pumer.adapters.cross import reader as cross
from pumer.adapters.cross.family import CrossAdapter, at_tokens, captured_for
from pumer.adapters.cross.memory import MemoryImages, Remaining
from pumer.adapters.cross.reader import Inputs, Readers, Reading
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prompt import ImageSpan, join_encoders
from pumer.adapters.decoder.vision import vision_features
from pumer.reducers.tokens import Encoder


@register
class MllamaAdapter(CrossAdapter):
    """Some layers of the language model read the tiles of all images of a sample, each of which
    begins with a [CLS]. Of the tower's attention a reducer sees that within a tile."""

    family = "Mllama"
    classes: ClassVar[tuple[str, ...]] = ("MllamaForConditionalGeneration", "MllamaModel")
    memory = "cross_attention_states"
    mask = "cross_attention_mask"
    wide_mask = True
    decodes = True

    def readers(self, model: nn.Module) -> list[nn.Module]:
        return [self.language(model)]

    def projector(self, model: nn.Module) -> nn.Module:
        projector: nn.Module = self.trunk(model).multi_modal_projector
        return projector

    def has_class_token(self, model: nn.Module) -> bool:
        return True

    def tower_attention(self, model: nn.Module) -> Any:
        return self.vision(model).global_transformer.layers[-1].self_attn

    def tower_shape(self, model: nn.Module) -> tuple[int, int, int]:
        vision = config_of(model).vision_config
        depth = vision.num_hidden_layers + vision.num_global_layers
        return depth, vision.hidden_size, vision.attention_heads

    def memory_width(self, model: nn.Module) -> int:
        width: int = config_of(model).text_config.hidden_size
        return width

    def layer_attention(self, layer: Any) -> Any:
        return getattr(layer, "self_attn", None) or layer.cross_attn

    def cache_channels(self, model: nn.Module) -> list[int]:
        text = config_of(model).text_config
        channels = text.hidden_size // text.num_attention_heads
        return [2 * text.num_key_value_heads * channels] * self.depth(model)

    def cached_tokens(self, model: nn.Module, lengths: Sequence[tuple[int, int]]) -> list[int]:
        text, image = lengths[0]
        crossing = self.language(model).config.cross_attention_layers
        length = self.memory_length(model, image)
        return [length if layer in crossing else text for layer in range(self.depth(model))]

    def images(
        self, readers: Readers, memory_BLD: Tensor, mask: Any, inputs: Inputs
    ) -> MemoryImages:
        """One for every image that is no padding; a sample without any has a blank one."""
        (rows, columns), device = self.default_grid(readers.model), memory_BLD.device
        tokens = rows * columns + 1
        batch, num_tiles = len(memory_BLD), memory_BLD.shape[1] // tokens
        real_BMT = torch.ones(batch, 1, num_tiles, dtype=torch.bool)
        tile_mask, ratios = (
            readers.inputs.get(name) for name in ("aspect_ratio_mask", "aspect_ratio_ids")
        )
        if tile_mask is not None and ratios is not None:
            given_BM1 = (ratios > 0)[..., None]
            real_BMT = (tile_mask > 0) & (given_BM1 | ~given_BM1.any(1, keepdim=True))
        spans, sample_index = [], []
        for sample, image, tiles in _tiles(real_BMT):
            first = image * real_BMT.shape[2]
            row = sample * real_BMT.shape[1] + image
            encoder = self._encoder(readers, memory_BLD[sample], row, first, tiles, tokens)
            span = ImageSpan(len(tiles) * (tokens - 1), grid=(rows, columns), encoder=encoder)
            if len(tiles) > 1:
                crop_I = torch.arange(len(tiles)).repeat_interleave(tokens - 1)
                grids = ((rows, columns),) * len(tiles)
                span = ImageSpan(len(crop_I), encoder=encoder, crop_I=crop_I, crop_grids=grids)
            spans.append(span)
            sample_index.append(sample)
        real_BL = real_BMT.flatten(1).repeat_interleave(tokens, 1).to(device)
        first_L = torch.arange(real_BL.shape[1], device=device) % tokens == 0
        structure = real_BMT.flatten(1).sum(1).tolist()
        return MemoryImages(spans, sample_index, real_BL & ~first_L, structure, real_BL)

    def _encoder(
        self,
        readers: Readers,
        memory_LD: Tensor,
        row: int,
        first: int,
        tiles: list[int],
        tokens: int,
    ) -> Encoder | None:
        captured = captured_for(readers)
        if captured is None:
            return None
        facts = []
        for tile in tiles:
            features = memory_LD[None, (first + tile) * tokens :][:, :tokens]
            # The tower fills up every tile to a multiple of eight tokens.
            index_P = tile * (-(-tokens // 8) * 8) + torch.arange(tokens)
            of_tile = at_tokens(captured, row, index_P, features)
            facts.append(Encoder(**vision_features(of_tile, True, True)))
        return join_encoders(facts, partial(torch.cat, dim=1))

    def read(self, readers: Readers, reader: Any, stock: Reading, inputs: Inputs) -> Any:
        """The memory comes with the prompt alone; after it is in the cache, whose masks are cut."""
        states, cache = inputs.get(self.memory), kv_cache.find(inputs)
        layers: list[int] = reader.config.cross_attention_layers
        held = kv_cache.layout(cache, layers[0])
        if states is None:
            if held is not None:
                cached = Remaining(index_BK=held.position_BK, filled_BK=held.filled_BK)
                mask, dtype = inputs.get(self.mask), next(reader.parameters()).dtype
                inputs[self.mask] = cross.cut_mask(readers, cached, mask, reader, dtype)
            return stock(inputs)
        kv_cache.check(cache)
        if held is not None:
            raise ValueError(
                "the cache holds an image whose tokens were reduced, to which no other can be "
                "added: give all images of a conversation in one prefill"
            )
        text = next(
            x for name in ("input_ids", "inputs_embeds") if (x := inputs.get(name)) is not None
        )
        memory_BLD = states.reshape(len(text), -1, states.shape[-1])
        output = cross.read(readers, reader, stock, inputs | {self.memory: memory_BLD})
        remaining = readers.remaining.get(memory_BLD)
        cache = kv_cache.find(output)
        if cache is not None and remaining is not None and remaining.index_BK is not None:
            length = memory_BLD.shape[1]
            layout = kv_cache.CacheLayout(remaining.index_BK, remaining.filled_BK, length)
            kv_cache.write(cache, dict.fromkeys(layers, layout))
        return output


def _tiles(real_BMT: Tensor) -> list[tuple[int, int, list[int]]]:
    """(sample, image, its tiles) of every image that has any; the host waits."""
    tiles_of_images = [
        (sample, image, [tile for tile, real in enumerate(tiles) if real])
        for sample, images in enumerate(real_BMT.tolist())
        for image, tiles in enumerate(images)
    ]
    return [entry for entry in tiles_of_images if entry[2]]
