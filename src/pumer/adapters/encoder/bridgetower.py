"""BridgeTower (Xu et al., AAAI 2023) as transformers has it: classes, layers and costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.base import Adapter, Patch, config_of, is_a, register
from pumer.adapters.encoder.bridgetower_forward import patch_trunk
from pumer.adapters.macs import attention_macs, co_attention_macs, head_macs
from pumer.reducers.tokens import Grid

OURS = (
    "BridgeTowerForQuestionAnswering",
    "BridgeTowerForImagesAndTextClassification",
    "BridgeTowerForVisualEntailment",
)
POOLED = (*OURS, "BridgeTowerForImageAndTextRetrieval")
"""Classes whose output depends on the pooled states alone: no output has a token axis."""
CONTRASTIVE = ("BridgeTowerForContrastiveLearning",)
"""Reads [CLS] in the towers' last states as well."""
PER_TOKEN = ("BridgeTowerModel", "BridgeTowerForMaskedLM")


@register
class BridgeTowerAdapter(Adapter):
    """All stock BridgeTower classes, and those of pumer.

    Tokens are reduced in the cross-modal layers, and in the image tower's layers below them: from
    there on bridges tie every token of a tower to one of the cross-modal layers.
    """

    family = "BridgeTower"
    classes = POOLED + CONTRASTIVE + PER_TOKEN
    modules: ClassVar[dict[str, str]] = dict.fromkeys(OURS, "pumer.models.bridgetower")
    has_cross_attention = True
    separate = ("BridgeTowerForImagesAndTextClassification",)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(trunk_of(model).cross_modal_text_layers)

    def tower_depth(self, model: nn.Module) -> int:
        return layers_before_bridges(config_of(model))

    def tower_attention_shape(self, model: nn.Module) -> tuple[int, int]:
        attention = trunk_of(model).vision_model.visual.transformer.resblocks[0].attn
        return attention.num_heads, attention.head_dim

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        text = config_of(model).text_config  # which the cross-modal layers are built from
        return text.num_attention_heads, text.hidden_size // text.num_attention_heads

    def patch(self, model: nn.Module, patch: Patch) -> None:
        patch_trunk(trunk_of(model), patch, is_a(model, POOLED))

    def default_grid(self, model: nn.Module) -> Grid:
        vision = config_of(model).vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        text = config_of(model).text_config
        # As in RoBERTa, positions up to the padding token's are skipped.
        return text.max_position_embeddings - text.pad_token_id - 1, rows * columns + 1

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        text = config_of(model).text_config
        return co_attention_macs(lengths, text.hidden_size, text.intermediate_size, after_layer)

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        config = config_of(model)
        text_config, vision = config.text_config, config.vision_config
        text, image = entry or lengths[0]
        tower = list(tower) or [image] * (self.tower_depth(model) + 1)
        tower += [tower[-1]] * (text_config.num_hidden_layers + 1 - len(tower))
        text_layer = attention_macs(text, text, text_config.hidden_size)
        text_layer += 2 * text * text_config.hidden_size * text_config.intermediate_size
        vision_layers = sum(
            attention_macs(before, before, vision.hidden_size) + 8 * after * vision.hidden_size**2
            for before, after in pairwise(tower)
        )
        patches = (tower[0] - 1) * vision.num_channels * vision.patch_size**2 * vision.hidden_size
        # A bridge projects only what is left of a tower's tokens.
        bridged = [(text, tower[-1]), *lengths[1:-1]]
        projected = sum(
            words * text_config.hidden_size + patches * vision.hidden_size
            for words, patches in bridged
        )
        layers = self.layer_macs(model, lengths, after_layer)
        head = head_macs(model, trunk_of(model))
        if is_a(model, PER_TOKEN):
            head *= text
        if is_a(model, CONTRASTIVE):  # projects all image tokens to read [CLS]
            head += tower[0] * vision.hidden_size * config.hidden_size
        times = self.forwards_per_example(model)
        return {
            "embedding": times * patches,
            "text encoder": times * text_config.num_hidden_layers * text_layer,
            "vision tower": times * vision_layers,
            "projection": times * projected * config.hidden_size,
            "attention": times * sum(attention for attention, _ in layers),
            "mlp": times * sum(mlp for _, mlp in layers),
            "head": times * 2 * config.hidden_size**2 + head,
        }


def trunk_of(model: nn.Module) -> Any:
    """The `BridgeTowerModel` of a model."""
    return getattr(model, "bridgetower", model)


def layers_before_bridges(config: Any) -> int:
    """Layers of each tower below the first cross-modal layer."""
    return config.text_config.num_hidden_layers - config.num_hidden_layers + 1
