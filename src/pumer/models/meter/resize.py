"""METER with another image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def resize_positions(table_ND: Tensor, side: int) -> Tensor:
    """Resize the vision tower's position embeddings [1+S*S,D], [CLS] first, to `side` x `side`
    patches.

    Bicubic, as in the original METER.
    """
    old = round((len(table_ND) - 1) ** 0.5)
    if old == side:
        return table_ND
    grid = table_ND[1:].T.unflatten(1, (old, old))[None].float()
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table_ND[:1], grid[0].flatten(1).T.to(table_ND.dtype)])
