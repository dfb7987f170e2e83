"""ViLT with another patch size.

Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023: a transformer trained on few,
large patches is a cheap initialization for one on many small ones.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def resize_patches(model: PreTrainedModel, patch_size: int) -> PreTrainedModel:
    """A copy of a ViLT model with another patch size.

    Args:
        model: any stock ViLT class, unreduced.
        patch_size: in pixels, a divisor of the model's image size.

    Raises:
        ValueError: if the image size is not a multiple of the patch size.
    """
    config = copy.deepcopy(model.config)
    if config.image_size % patch_size:
        raise ValueError(
            f"images of {config.image_size} px have no whole number of patches of {patch_size} px"
        )
    config.patch_size = patch_size
    resized = type(model)(config)
    state = model.state_dict()
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    weight = f"{prefix}embeddings.patch_embeddings.projection.weight"
    positions = f"{prefix}embeddings.position_embeddings"
    state[weight] = _resize_filter(state[weight], patch_size)
    state[positions] = _resize_table(state[positions], config.image_size // patch_size)
    resized.load_state_dict(state)
    return resized


def _resize_filter(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The filter that maps a patch of `size` px as the old filter maps the resized patch."""
    old = weight.shape[-1]
    basis = torch.eye(size * size, dtype=weight.dtype).view(size * size, 1, size, size)
    enlarge = nn.functional.interpolate(basis, size=(old, old), mode="bilinear").flatten(1)
    return (weight.flatten(2) @ enlarge.T).unflatten(2, (size, size))


def _resize_table(table: torch.Tensor, side: int) -> torch.Tensor:
    old = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
