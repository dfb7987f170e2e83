"""How many tokens to keep: integer functions of lengths and settings, independent of the data.

Each takes a Python int, or an int64 tensor with one length per sample, and returns the same type,
so that a row of a padded batch gets the same budget as alone, without a host-device sync. Rounding
is half to even, as in the published PuMer code, unless a function says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)


def stage_layers(count: int, depth: int, last: int) -> tuple[int, ...]:
    """The last layers of the first `count` stages, if `depth` layers are `count` + 1 equal stages.

    Three stages of 12 layers end after layers 2, 5 and 8 (PuMer), of 32 layers after 7, 15 and 23
    (PyramidDrop).

    Example:
        >>> from pumer.reducers.ops.budget import stage_layers
        >>> stage_layers(3, depth=12, last=11)
        (2, 5, 8)
    """
    return spread([(stage + 1) / (count + 1) for stage in range(count)], depth, last)


def spread(shares: Sequence[float], depth: int, last: int) -> tuple[int, ...]:
    """Rising layers up to `last`, at these shares of a model's `depth` layers.

    Raises:
        ValueError: if the model has fewer layers than there are shares.
    """
    layers: list[int] = []
    for share in shares:
        layers.append(max(round(share * depth) - 1, layers[-1] + 1 if layers else 0))
    # In a shallow model the last ones move up, to layers where tokens can still be saved.
    layers = [
        min(layer, last - behind)
        for behind, layer in zip(range(len(layers) - 1, -1, -1), layers, strict=True)
    ]
    if layers and layers[0] < 0:
        raise ValueError(
            f"there are {len(layers)} stages, but only {last + 1} layers to act in: give fewer"
        )
    return tuple(layers)


def portion(ratio: float, count: Count) -> Count:
    """`ratio` of `count`, rounded half to even."""
    if isinstance(count, Tensor):
        return torch.round(count.double() * ratio).long()
    return round(ratio * count)


def remaining(prune: float, count: Count) -> Count:
    """How many of `count` tokens stay if a share is pruned; at least one."""
    return larger(count - portion(prune, count), smaller(count, 1))


def stage(keep: float, number: int, start: Count, count: Count) -> Count:
    """How many of `count` tokens stay after a stage, counted from 1, if each keeps a share.

    `int(start * keep**number)`, as in the published code of DynamicViT; at least one stays.
    """
    share = keep**number
    num_kept = (start.double() * share).long() if isinstance(start, Tensor) else int(start * share)
    return larger(smaller(num_kept, count), smaller(count, 1))


def num_keep(keep: float | int, count: Count) -> Count:
    """How many of `count` tokens to keep: `keep` is a share (float) or a number (int).

    At least one. If there are fewer tokens than the number, all stay, as the images of a batch
    differ in size.
    """
    if isinstance(count, Tensor):
        return (
            count.clamp_max(keep)
            if isinstance(keep, int)
            else torch.minimum(count, portion(keep, count).clamp_min(1))
        )
    return min(count, keep if isinstance(keep, int) else max(1, portion(keep, count)))


def check_keep(**budgets: float | int) -> None:
    """Raise ValueError unless every budget is a share in (0, 1] or a whole number from 1."""
    for name, keep in budgets.items():
        is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
        if not (is_count or (isinstance(keep, float) and 0 < keep <= 1)):
            raise ValueError(
                f"{name} is a share such as 0.25 or a whole number of tokens such as 128, not "
                f"{keep!r}"
            )


def halves(count: Count) -> Count:
    """The most tokens that one bipartite matching of `count` tokens can merge away."""
    return count // 2


def smaller(count: Count, limit: Count | int) -> Count:
    """The smaller of a count and a limit."""
    if isinstance(count, Tensor):
        return count.clamp_max(limit) if isinstance(limit, int) else torch.minimum(count, limit)
    return min(count, int(limit))


def larger(count: Count, least: Count) -> Count:
    """The larger of a count and a limit."""
    if isinstance(count, Tensor):
        return torch.maximum(count, least)
    return max(count, least)


def prune_then_merge(count: Count, prune: float, merge: float) -> tuple[Count, Count]:
    """(kept, merged): how many of `count` tokens pruning keeps, and how many of these are merged
    away.

    Both ratios are of the unpruned count, as in PuMer. Their sum is rounded once, so that more
    tokens never leave fewer: the padded length is an upper bound for every sample. At least one
    token stays.
    """
    kept = larger(count - portion(prune, count), smaller(count, 1))
    return kept, merged_of(kept, count, prune, merge)


def merged_of(kept: Count, count: Count, prune: float, merge: float) -> Count:
    """How many of the kept tokens are merged away; see `prune_then_merge`."""
    return smaller(portion(prune + merge, count) - portion(prune, count), halves(kept))


def merge_schedule(r: int | tuple[int, float] | Sequence[int], layers: int) -> list[int]:
    """Tokens to merge away in every layer (ToMe, appendix on schedules).

    Args:
        r: one number for all layers; `(number, inflection)` with inflection in [-1, 1], which tilts
            the numbers from decreasing (-1) over constant (0) to increasing (1) at the same mean;
            or a list, one per layer (missing ones are zero).
        layers: number of layers.

    Example:
        >>> from pumer.reducers.ops.budget import merge_schedule
        >>> merge_schedule((8, -1.0), 3)  # decreasing
        [16, 8, 0]
    """
    inflection = 0.0
    if not isinstance(r, int):
        if not (isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float)):
            return [int(value) for value in r][:layers] + [0] * (layers - len(r))
        inflection = r[1]
        r = int(r[0])
    if not -1.0 <= inflection <= 1.0:
        raise ValueError(f"the inflection of a merge schedule lies in [-1, 1], not {inflection}")
    first = int(r * (1.0 - inflection))  # a whole number, as in ToMe's own schedules
    step = (2 * r - 2 * first) / max(layers - 1, 1)
    return [int(first + step * layer) for layer in range(layers)]
