"""ViLT's patch embedding, in raster order and without host reads.

Shape suffixes: B batch, D channels, R rows, L columns of patches, P = R * L patches, S side of the
position table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pumer.reducers.plan import tokens_at


def embed_patches(
    embeddings: Any, pixel_values: Tensor, pixel_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Replaces `ViltEmbeddings.visual_embed`, without a loop over the batch or a host-device sync.

    The stock method samples the patches of an image at random; here they are in raster order, real
    ones first. Of an image with more patches than `config.max_image_length`, evenly spaced ones
    are taken.

    Args:
        pixel_values: [B,3,height,width].
        pixel_mask: [B,height,width], 1 at real pixels; None where all are real.

    Returns:
        embeddings [B,1+P,D] with [CLS] first, bool mask [B,1+P], raster number of each patch
        [B,1+P] (-1: [CLS]), and rows and columns of patches.
    """
    # Patch features [B,D,R,L], and which patches are real.
    features = embeddings.patch_embeddings(pixel_values)
    batch, _, rows, columns = features.shape
    if pixel_mask is None:
        real_BRL = torch.ones(batch, rows, columns, dtype=torch.bool, device=features.device)
    else:
        nearest = nn.functional.interpolate(pixel_mask[:, None].float(), size=(rows, columns))
        real_BRL = nearest[:, 0].long() > 0
    # Positions, resized to the grid of every image.
    table_1P = embeddings.position_embeddings
    side = embeddings.config.image_size // embeddings.config.patch_size
    position_BRLD = _resize_positions(
        table_1P[0, 1:].unflatten(0, (side, side)),
        real_BRL[:, :, 0].sum(1),
        real_BRL[:, 0].sum(1),
        rows,
        columns,
    )
    tokens_BPD = features.flatten(2).transpose(1, 2) + position_BRLD.flatten(1, 2)

    # At most `max_image_length` patches, evenly spaced; real ones move to the front.
    real_BP = real_BRL.flatten(1)
    limit = embeddings.config.max_image_length
    length = real_BP.shape[1]
    if isinstance(limit, int) and 0 < limit < length:
        position_BP, count = real_BP.long().cumsum(1) - 1, real_BP.sum(1, keepdim=True).clamp_min(1)
        kept = count.clamp_max(limit)
        real_BP = real_BP & ((position_BP + 1) * kept // count > position_BP * kept // count)
        length = limit
    order_BP = (~real_BP).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    tokens_BPD, real_BP = tokens_at(tokens_BPD, order_BP), tokens_at(real_BP, order_BP)

    # [CLS] in front of all.
    cls_BD = (embeddings.cls_token + table_1P[:, :1]).expand(batch, -1, -1)
    states = embeddings.dropout(torch.cat([cls_BD, tokens_BPD], dim=1))
    mask = nn.functional.pad(real_BP, (1, 0), value=True)
    return states, mask, nn.functional.pad(order_BP, (1, 0), value=-1), (rows, columns)


def _resize_positions(
    table_SSD: Tensor, height_B: Tensor, width_B: Tensor, rows: int, columns: int
) -> Tensor:
    """Bilinear resize (align_corners) of a square position table to each image's size ->
    [B,R,L,D]."""
    side = table_SSD.shape[0]
    down_BRS = _hat_weights(height_B, rows, side)
    across_BLS = _hat_weights(width_B, columns, side)
    stretched = down_BRS @ table_SSD.float().flatten(1)
    return (across_BLS[:, None] @ stretched.unflatten(-1, (side, -1))).to(table_SSD.dtype)


def _hat_weights(size_B: Tensor, length: int, side: int) -> Tensor:
    """Interpolation weights [B,length,side] of the table entries, for images `size_B` patches
    long."""
    position_L = torch.arange(length, device=size_B.device)
    source_BL = position_L * ((side - 1) / (size_B - 1).clamp_min(1))[:, None]
    source_BL = torch.where(size_B[:, None] > 1, source_BL, 0.0).clamp_max(side - 1)
    return (1 - (source_BL[..., None] - torch.arange(side, device=size_B.device)).abs()).clamp_min(
        0
    )
