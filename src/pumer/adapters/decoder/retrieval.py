"""Retrievers of pages: ColPali, ColQwen2 (Faysse et al., 2024) and ColModernVBert as transformers
has them.

A page, or a query, becomes one vector per token of its prompt, and late interaction compares every
vector of one with every vector of the other. Of a reduced page the tokens left have one each.

Shape suffixes: B samples, S tokens of the prompts, K tokens left, D channels of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pumer.adapters.base import Patch, register
from pumer.adapters.decoder.family import DecoderAdapter
from pumer.adapters.decoder.output import kept_positions
from pumer.adapters.decoder.paligemma import PaliGemmaAdapter
from pumer.adapters.decoder.prompt import ForwardState
from pumer.adapters.decoder.qwen_vl import QwenVLAdapter
from pumer.adapters.decoder.smolvlm import SmolVLMAdapter
from pumer.adapters.decoder.vision import VisionCapture


@dataclass
class ReducedRetrievalOutput(ModelOutput):
    """What a reduced retriever gives of pages: the fields of the stock output, and a mask.

    Args:
        embeddings: a vector for every token left, in their order, zeros behind them [B,K,D].
        attention_mask: 1 where there is one [B,K].
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_outputs: Any = None
    attention_mask: Tensor | None = None


class Retriever(DecoderAdapter):
    """A retriever around a model of another family; what it is around comes behind it among the
    bases of its class."""

    decodes = False
    inside: ClassVar[tuple[str, ...]]
    """Classes that a trunk may have."""

    def trunk(self, model: nn.Module) -> Any:
        return getattr(model, "vlm", model)

    def patch(self, model: nn.Module, patch: Patch) -> None:
        inner = type(self.trunk(model)).__name__
        if inner not in self.inside:
            raise ValueError(
                f"{type(model).__name__} is reduced around {' or '.join(self.inside)}, not around "
                f"a {inner}"
            )
        super().patch(model, patch)

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Those of a page; a vector is made of every token, and then dropped with it."""
        parts = super().macs(model, lengths, entry, tower, after_layer)
        return parts | {"head": sum(entry or lengths[0]) * self.head_macs(model)}

    def output(self, state: ForwardState, output: Any) -> Any:
        if not state.layouts or state.layouts[-1].unreduced:
            return output
        kept_BK = kept_positions(state, state.layouts[-1]) - state.past
        if isinstance(output, tuple):
            vectors_BKD, mask_BK = _of_kept(output[0], kept_BK)
            return vectors_BKD, *output[1:], mask_BK
        vectors_BKD, mask_BK = _of_kept(output.embeddings, kept_BK)
        values = dict(output) | {"embeddings": vectors_BKD, "attention_mask": mask_BK}
        return ReducedRetrievalOutput(**values)


def _of_kept(embeddings_BSD: Tensor, kept_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of these tokens, and which are there: negative positions have none."""
    real_BK = (kept_BK >= 0).to(embeddings_BSD.device)
    at_BK = kept_BK.clamp_min(0).to(embeddings_BSD.device)
    index_BKD = at_BK[..., None].expand(-1, -1, embeddings_BSD.shape[2])
    return embeddings_BSD.gather(1, index_BKD) * real_BK[..., None], real_BK.long()


@register
class ColPaliAdapter(Retriever, PaliGemmaAdapter):
    """A page is an image and a line of text."""

    family = "ColPali"
    classes: ClassVar[tuple[str, ...]] = ("ColPaliForRetrieval",)
    inside = ("PaliGemmaModel",)


@register
class ColQwen2Adapter(Retriever, QwenVLAdapter):
    """It asks the tower itself, puts the features among the words, and gives its trunk embeddings
    alone."""

    family = "ColQwen2"
    classes: ClassVar[tuple[str, ...]] = ("ColQwen2ForRetrieval",)
    inside = ("Qwen2VLModel", "Qwen2_5_VLModel")
    placeholder_hook = None
    merges_images = True

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        super().install(patch, model, capture)
        patch.wrap(self.vision(model), "forward", _tower_forward, self.trunk(model), capture)


@register
class ColModernVBertAdapter(Retriever, SmolVLMAdapter):
    """Around an encoder, ModernVBERT (Teiletche et al., 2025): every token sees every other, in
    most layers within a window; images are cut as SmolVLM's are."""

    family = "ColModernVBert"
    classes: ClassVar[tuple[str, ...]] = ("ColModernVBertForRetrieval",)
    inside = ("ModernVBertModel",)
    causal = False
    renumbers = False  # positions do not reach the layers
    merge_side = "pixel_shuffle_factor"

    def patch(self, model: nn.Module, patch: Patch) -> None:
        types = self.language(model).config.layer_types[:-1]
        reducer, first = patch.reducer, patch.reducer.layer_offset
        full = [index for index, name in enumerate(types) if name == "full_attention"]
        for layer in range(len(types)) if reducer.traits.needs_qk else ():
            if reducer.reduces_at(layer) and layer not in full:
                raise ValueError(
                    f"{reducer.name} reads the attention of layer {layer + first}, which sees a "
                    "window on both sides of a token: give layers that see everything, "
                    f"{', '.join(str(index + first) for index in full)}"
                )
        super().patch(model, patch)


def _tower_forward(
    tower: nn.Module,
    stock: Any,
    trunk: Any,
    capture: VisionCapture,
    pixel_values: Tensor,
    grid_thw: Tensor,
    **kwargs: Any,
) -> Any:
    """In place of the tower's `forward`: the images go through `get_image_features`, where they are
    recorded, and come back in one row."""
    if capture.current is not None:  # this is where they come through
        return stock(pixel_values, grid_thw=grid_thw, **kwargs)
    output = trunk.get_image_features(pixel_values, grid_thw)
    output.pooler_output = torch.cat(output.pooler_output)
    return output
