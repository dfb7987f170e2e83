"""Granite 4 Vision (IBM, 2026) as transformers has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import pool_squares
from pumer.adapters.decoder.hooks import STATE
from pumer.adapters.decoder.llava import PackedAdapter
from pumer.adapters.decoder.media import of_kept
from pumer.adapters.decoder.parts import ATTENTION, feature_depth, named, tower_layers
from pumer.adapters.decoder.prompt import ForwardState, current_state
from pumer.adapters.decoder.vision import VisionCapture
from pumer.adapters.macs import linear_weights


@register
class Granite4VisionAdapter(PackedAdapter):
    """Features of several layers of the tower are added before several layers of the language
    model, whose image tokens are zeros at first."""

    family = "Granite 4 Vision"
    classes: ClassVar[tuple[str, ...]] = (
        "Granite4VisionForConditionalGeneration",
        "Granite4VisionModel",
    )

    def projector(self, model: nn.Module) -> nn.Module:
        return self.trunk(model).layerwise_projectors[0]

    def patches_per_token(self, model: nn.Module) -> int:
        return round(Fraction(config_of(model).downsample_rate) ** -2)

    def tower_attention(self, model: nn.Module) -> Any:
        config, vision = config_of(model), self.vision(model)
        used = [*(layer for layer, _ in config.deepstack_layer_map), config.spatial_vision_layer]
        return named(tower_layers(vision)[feature_depth(vision, used) - 1], ATTENTION)

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        rows, columns = self.default_grid(trunk)
        captured = captured.of_view(0)
        return pool_squares(super().vision_facts(trunk, captured), rows * columns)

    def vision_macs(
        self, model: nn.Module, image: int, tower: Sequence[int] = ()
    ) -> tuple[int, int]:
        trunk = self.trunk(model)
        weights = map(linear_weights, (trunk.layerwise_projectors, trunk.spatial_projectors))
        return super().vision_macs(model, image, tower)[0], image * sum(weights)

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        super().install(patch, model, capture)
        patch.wrap(self.language(model), "forward", _keep_planes)
        for layer_index, layer in enumerate(self.layers(model)):
            add = partial(_add_plane, layer_index)
            hook = layer.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
            patch.hook(hook)


def _keep_planes(
    language: Any,
    stock: Callable[..., Any],
    *args: Any,
    vision_mask: Tensor | None = None,
    deepstack_features: dict[int, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the language model's `forward`, which would add the features of all tokens."""
    state = current_state()
    if state is None or vision_mask is None or deepstack_features is None:
        planes = {"vision_mask": vision_mask, "deepstack_features": deepstack_features}
        return stock(*args, **planes, **kwargs)
    state.planes = vision_mask, deepstack_features
    return stock(*args, **kwargs)


def _add_plane(layer_index: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a layer, and before what it is given is reduced: add its features."""
    state: ForwardState | None = kwargs.get(STATE) or current_state()
    if state is None or state.planes is None or layer_index not in state.planes[1]:
        return None
    (mask, planes), (states, *others) = state.planes, args
    add = partial(of_kept, state, states, mask, planes[layer_index])
    return (states + state.memoize((planes[layer_index],), add), *others), kwargs
