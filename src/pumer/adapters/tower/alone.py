"""Vision transformers by themselves, or with a text tower beside them: CLIP, SigLIP, SigLIP 2, ViT
and DINOv2, as transformers has them.

Shape suffixes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Adapter, Patch, is_a, register
from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.macs import attention_and_mlp_lengths
from pumer.adapters.tower import blocks
from pumer.adapters.tower.axis import Rows
from pumer.adapters.tower.run import TowerRun, TowerSpec, current_run, install
from pumer.reducers import Reducer
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Grid

INNER = ("vision_model", "vit", "dinov2")
"""Attributes that hold the tower of a model with more than that."""
MEAN = (
    "CLIPForImageClassification",
    "SiglipForImageClassification",
    "Siglip2ForImageClassification",
    "Dinov2ForImageClassification",
)
"""Classes that average the tower's output over patches."""


class TowerAdapter(Adapter):
    """A vision transformer that is itself what is used: an encoder of images alone."""

    mask: ClassVar[str] = ""
    """The argument of its forward that is 0 for padded patches."""

    def vision(self, model: nn.Module) -> Any:
        """The tower."""
        return next((getattr(model, name) for name in INNER if hasattr(model, name)), model)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        vision = self.vision(model)
        encoder = getattr(vision, "encoder", vision)
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)

    def default_grid(self, model: nn.Module) -> Grid:
        config = self.vision(model).config
        side = config.image_size // config.patch_size
        return side, side

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        rows, columns = self.default_grid(model)
        return 0, rows * columns + self.num_prefix_tokens

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        config = self.vision(model).config
        heads = config.num_attention_heads
        return heads, config.hidden_size // heads

    def shape(self, model: nn.Module) -> ModelShape:
        return replace(super().shape(model), co_attention=None)

    def check(self, reducer: Reducer) -> None:
        super().check(reducer)
        traits = reducer.traits
        if traits.needs_text:
            raise ValueError(
                f"{reducer.name} is guided by the text, and a vision tower has none: take tome, "
                "dymu or divprune"
            )
        if traits.drops_image:
            raise ValueError(
                f"{reducer.name} leaves no image token, and a vision tower has no other"
            )
        if traits.learned is not None:
            raise ValueError(
                f"{reducer.name} learns where text and image meet, which a vision tower has not: "
                "take tome, dymu or divprune"
            )

    def patch(self, model: nn.Module, patch: Patch) -> None:
        vision, layers = self.vision(model), self.layers(model)
        depth = len(layers)
        spec = TowerSpec(tuple(range(depth)), depth, alone=True)
        begin = partial(_begin, patch, self.num_prefix_tokens, self.mask)
        finish = partial(_finish, is_a(model, MEAN))
        install(patch, vision, layers, spec, begin, finish)
        pooling = getattr(vision, "head", None)
        if pooling is not None:
            patch.wrap(pooling, "forward", _pool, patch)
            patch.wrap(pooling.attention, "forward", _attend_to_tokens, patch)

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        return [
            blocks.layer_macs(layer, before, after)
            for layer, ((_, before), (_, after)) in zip(
                self.layers(model), attention_and_mlp_lengths(lengths, after_layer), strict=True
            )
        ]

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Costs of an image; of a model with two towers, those of its vision tower."""
        layers = self.layer_macs(model, lengths, after_layer)
        vision, (_, image) = self.vision(model), entry or lengths[0]
        inside = {part for layer in self.layers(model) for part in layer.modules()}
        patches = sum(
            part.weight.numel()
            for part in vision.embeddings.modules()
            if isinstance(part, (nn.Linear, nn.Conv2d))
        )
        others = {part for part in vision.modules() if part not in inside}
        others |= {part for name, part in model.named_children() if name in HEADS}
        head = sum(
            part.in_features * part.out_features
            for part in others - {*vision.embeddings.modules()}
            if isinstance(part, nn.Linear)
        )
        if getattr(vision, "head", None) is not None:  # keys and values of what attention pools
            width = vision.config.hidden_size
            head += 2 * lengths[-1][1] * width**2 + width**2 + 2 * lengths[-1][1] * width
        return {
            "embedding": (image - self.num_prefix_tokens) * patches,
            "attention": sum(attention for attention, _ in layers),
            "mlp": sum(mlp for _, mlp in layers),
            "head": head,
        }


HEADS = ("visual_projection", "classifier")
"""Linear layers of a model behind its tower."""


@register
class ClipAdapter(TowerAdapter):
    """CLIP (Radford et al., 2021): the vision tower, alone or beside the text tower."""

    family = "CLIP"
    classes = (
        "CLIPModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
    )


@register
class ViTAdapter(TowerAdapter):
    """ViT (Dosovitskiy et al., 2021)."""

    family = "ViT"
    classes = ("ViTModel", "ViTForImageClassification")


@register
class Dinov2Adapter(TowerAdapter):
    """DINOv2 (Oquab et al., 2024)."""

    family = "DINOv2"
    classes = ("Dinov2Model", "Dinov2ForImageClassification")


@register
class SiglipAdapter(TowerAdapter):
    """SigLIP (Zhai et al., 2023), which has no [CLS] and pools by attention."""

    family = "SigLIP"
    classes = ("SiglipModel", "SiglipVisionModel", "SiglipForImageClassification")
    num_prefix_tokens = 0


@register
class Siglip2Adapter(SiglipAdapter):
    """SigLIP 2 (Tschannen et al., 2025) for images of any shape, with padded patches."""

    family = "SigLIP 2"
    classes = ("Siglip2Model", "Siglip2VisionModel", "Siglip2ForImageClassification")
    mask = "pixel_attention_mask"

    def default_grid(self, model: nn.Module) -> Grid:
        side = int(self.vision(model).config.num_patches ** 0.5)
        return side, side


def _begin(
    patch: Patch,
    num_prefix_tokens: int,
    mask: str,
    embeddings_BND: Tensor,
    inputs: dict[str, Any],
    masked: bool,
) -> tuple[Rows, EncoderLayout]:
    """The axis of the images of a forward."""
    axis = Rows(num_prefix_tokens)
    pixels, grid = inputs.get("pixel_values"), None
    if pixels is not None and pixels.ndim == 4:
        size = inputs["self"].config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
    layout = axis.layout(embeddings_BND, grid, inputs.get(mask) if masked else None)
    patch.entry = (0, embeddings_BND.shape[1], grid)
    return axis, layout


def _finish(mean: bool, run: TowerRun, output: Any) -> Any:
    """The tower's output, and what `report` and `kept` say of it; tokens are left as many as they
    are, but for a head that averages them."""
    patch, layout = run.patch, run.layout
    assert layout is not None
    patch.lengths = [(0, length) for length in run.lengths]
    patch.kept = layout.places(0, 0)
    patch.sizes, patch.slots = layout.sizes_BN, None
    if layout.plan is None:
        return output
    patch.slots = layout.plan.slot_BN
    if mean:
        output.last_hidden_state = _for_mean(run, output.last_hidden_state)
    return output


def _for_mean(run: TowerRun, states_BKD: Tensor) -> Tensor:
    """States of every patch, so that their mean is that of the tokens left, by size: a merged patch
    has those of its token, a dropped one that mean."""
    layout, plan = run.layout, run.plan
    assert layout is not None
    assert plan is not None
    full_BND = plan.expand(states_BKD)
    first = layout.num_prefix_tokens
    weight_BK = (layout.sizes_BN * layout.mask_BN)[:, first:, None].to(states_BKD.dtype)
    mean_BD = (states_BKD[:, first:] * weight_BK).sum(1) / weight_BK.sum(1)
    return torch.where((plan.slot_BN < 0)[..., None], mean_BD[:, None], full_BND)


def _pool(
    head: Any,
    stock: Any,
    patch: Patch,
    hidden_state: Tensor,
    attention_mask: Tensor | None = None,
) -> Any:
    """In place of the forward of SigLIP's pooling, whose mask is that of the unreduced patches:
    `_attend_to_tokens` puts that of the tokens left."""
    run = current_run(patch)
    if attention_mask is None or (run is not None and run.plan is not None):
        return stock(hidden_state)
    return stock(hidden_state, attention_mask)


def _attend_to_tokens(
    attention: Any,
    stock: Any,
    patch: Patch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """In place of its attention's forward: a merged token counts by its size."""
    run = current_run(patch)
    if run is not None and run.plan is not None:
        assert run.layout is not None
        bias_B11K = kernels.attention_bias(
            run.layout.mask_BN,
            run.layout.sizes_BN if patch.traits.proportional_attention else None,
            query.dtype,
        )
        if bias_B11K.dtype == torch.bool:
            bias_B11K = torch.zeros_like(bias_B11K, dtype=query.dtype).masked_fill(
                ~bias_B11K, -torch.inf
            )
        attn_mask = bias_B11K.expand(-1, attention.num_heads, -1, -1).flatten(0, 1)
    return stock(query, key, value, attn_mask=attn_mask, **kwargs)
