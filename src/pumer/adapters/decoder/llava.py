"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision (Liu et al., 2024; Li et al., 2024) as transformers has
them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of, is_a, register
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.family import DecoderAdapter, one_span_each
from pumer.adapters.decoder.parts import tower_layers
from pumer.adapters.decoder.pixtral import PIXTRAL
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import VisionCapture, vision_features
from pumer.reducers.tokens import Encoder, Grid

TOWERS = ("CLIPVisionModel", "SiglipVisionModel")
"""Vision towers that are known."""
Assemble = Callable[..., list[Tensor]]


@register
class LlavaAdapter(DecoderAdapter):
    """Every image is one grid of patches, of a CLIP tower, whose [CLS] is left out, or a SigLIP
    one, which has none; with Pixtral's it is another family (`pixtral`)."""

    family = "LLaVA 1.5"
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration", "LlavaModel")
    projects_tokens = True
    merges_in_tower = True

    def fits(self, model: nn.Module) -> bool:
        return not is_a(self.vision(model), (PIXTRAL,))

    def patch(self, model: nn.Module, patch: Patch) -> None:
        vision = self.vision(model)
        if not is_a(vision, TOWERS):
            raise ValueError(
                f"unsupported vision tower {type(vision).__name__} in this {type(model).__name__}: "
                "expected one of "
                f"{', '.join(TOWERS)}"
            )
        super().patch(model, patch)

    def has_class_token(self, model: nn.Module) -> bool:
        return config_of(model).vision_config.model_type == "clip_vision_model"

    def tower_reason(self, model: nn.Module) -> str | None:
        kept = config_of(model).vision_feature_select_strategy == "full"
        if not kept and not self.has_class_token(model):
            return "its first patch is dropped behind the tower, with all that were merged into it"
        return super().tower_reason(model)

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        return super().tower_attentions(model) if is_a(self.vision(model), TOWERS) else {}

    def last_attention(self, model: nn.Module) -> Any:
        return tower_layers(self.vision(model))[-1].self_attn

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        cls, full = self.has_class_token(trunk), _takes_all(trunk, captured)
        # Where not all are taken a tower's first token is dropped, whether that is [CLS] or a
        # patch.
        return vision_features(captured, cls or not full, cls and full)

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        tokens = len(output.pooler_output[0])
        first_is_class = _takes_all(trunk, captured) and self.has_class_token(trunk)
        structure = torch.arange(tokens) == 0 if first_is_class else None
        rows, columns = grid = self.default_grid(trunk)
        fills_grid = rows * columns == tokens - int(first_is_class)
        facts = self.vision_facts(trunk, captured)
        return one_span_each(output.pooler_output, grid if fills_grid else None, facts, structure)


@register
class VideoLlavaAdapter(LlavaAdapter):
    """Video-LLaVA (Lin et al., 2024), whose images have a tower of their own; videos are left as
    they are."""

    family = "Video-LLaVA"
    classes: ClassVar[tuple[str, ...]] = ("VideoLlavaForConditionalGeneration", "VideoLlavaModel")


class PackedAdapter(LlavaAdapter):
    """An image is put together from a thumbnail and crops, with a newline token at the end of every
    row."""

    on_host = ("image_sizes",)
    # The projector does, but behind it crops are trimmed, and would lose parts of merged tokens.
    projects_tokens = False

    def tower_reason(self, model: nn.Module) -> str | None:
        return (
            "crops are trimmed behind the tower, and merged tokens would lose parts of themselves"
        )

    def install(self, patch: Patch, model: nn.Module, capture: VisionCapture) -> None:
        patch.wrap(self.trunk(model), "pack_image_features", pack, capture)

    def vision_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]:
        return vision_features(captured, self.has_class_token(trunk))

    def image_spans(self, trunk: Any, output: Any, captured: Captured) -> list[ImageSpan]:
        shapes, assemble = captured.packed
        # Newlines among nothing: the model's own way of putting images together says where they
        # come.
        blank = [torch.zeros(*shape[:2], 1) for shape in shapes]
        marks = assemble(blank, image_newline=torch.ones(1))
        facts = {
            name: _assembled(value, shapes, assemble)
            for name, value in self.vision_facts(trunk, captured).items()
        }
        crops = _crops(shapes, assemble)
        images = []
        for image_index, mark in enumerate(marks):
            structure = mark[:, 0] > 0.5
            patch_NI = (~structure).nonzero().T
            encoder = {
                name: value[image_index][patch_NI.to(value[image_index].device)]
                for name, value in facts.items()
            }
            grid, several = self.default_grid(trunk), shapes[image_index][0] > 1
            images.append(
                ImageSpan(
                    len(mark),
                    structure,
                    None if several else grid,
                    Encoder(**encoder) if encoder else None,
                    crop_I=crops[image_index][~structure] if several else None,
                    crop_grids=_crop_grids(structure, crops[image_index], grid) if several else (),
                )
            )
        return images


@register
class LlavaNextAdapter(PackedAdapter):
    """LLaVA-NeXT, and its form for videos, which are left as they are."""

    family = "LLaVA-NeXT"
    classes: ClassVar[tuple[str, ...]] = (
        "LlavaNextForConditionalGeneration",
        "LlavaNextModel",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextVideoModel",
    )


@register
class LlavaOnevisionAdapter(PackedAdapter):
    """LLaVA-OneVision, whose SigLIP tower has no [CLS]; videos are left as they are."""

    family = "LLaVA-OneVision"
    classes: ClassVar[tuple[str, ...]] = (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionModel",
    )


def pack(
    trunk: Any,
    stock: Callable[..., Any],
    capture: VisionCapture,
    image_features: Sequence[Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of `pack_image_features`: the same, and how it was done noted."""
    captured = capture.current
    names = [*inspect.signature(type(trunk).pack_image_features).parameters][2:]
    again = dict(zip(names, args, strict=False)) | kwargs
    again.pop("image_newline", None)
    shapes = [tuple(features.shape) for features in image_features]
    if captured is not None:
        again["image_sizes"] = again["image_sizes"].cpu()
        captured.packed = shapes, partial(_assemble, stock, **again)
    return stock(image_features, *args, **kwargs)


def _assemble(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The images that `pack_image_features` gives, in some families with their lengths."""
    assembled = stock(*args, **kwargs)
    return list(assembled[0] if isinstance(assembled, tuple) else assembled)


def _takes_all(trunk: Any, captured: Captured) -> bool:
    """Whether the tower's first token is handed on, too."""
    strategy = (
        captured.inputs.get("vision_feature_select_strategy")
        or trunk.config.vision_feature_select_strategy
    )
    return bool(strategy == "full")


def _crops(shapes: Sequence[tuple[int, ...]], assemble: Assemble) -> list[Tensor]:
    """The crop that every token of every image comes from, or mostly does where features were
    scaled: int64 [N]."""
    most = max(shape[0] for shape in shapes)
    marks = [torch.eye(most)[: shape[0], None].repeat(1, shape[1], 1) for shape in shapes]
    packed = assemble(marks, image_newline=torch.zeros(most))
    return [share_NC.argmax(1) for share_NC in packed]


def _crop_grids(structure: Tensor, crop_N: Tensor, thumbnail: Grid) -> tuple[Grid | None, ...]:
    """Rows and columns of the patches of every crop, of which parts may have been cut off.

    Args:
        structure: bool, the ends of rows.
        crop_N: the crop of every token, the thumbnail first, which has no ends of rows.
        thumbnail: its rows and columns.
    """
    row_N = structure.long().cumsum(0)
    grids: list[Grid | None] = []
    for crop in range(int(crop_N.max()) + 1):
        row_I = row_N[(crop_N == crop) & ~structure]
        rows = len(row_I.unique()) if crop else thumbnail[0]
        grid = (rows, len(row_I) // max(rows, 1))
        grids.append(grid if grid[0] * grid[1] == len(row_I) else None)
    return tuple(grids)


def _assembled(
    value: Tensor, shapes: Sequence[tuple[int, ...]], assemble: Assemble
) -> list[Tensor]:
    """What is known of the tokens of all crops, in the order of every image's tokens: a list of [N]
    or [N,C]."""
    wide = value[..., None] if value.ndim == 2 else value
    parts = list(torch.split(wide, [shape[0] for shape in shapes]))
    packed = assemble(parts, image_newline=wide.new_zeros(wide.shape[-1]))
    return [part[..., 0] if value.ndim == 2 else part for part in packed]
