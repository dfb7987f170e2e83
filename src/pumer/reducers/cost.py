"""What a method itself computes: the price of choosing."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pumer.reducers.base import EMBEDDINGS, Encoder, Grid, Reducer, Tokens


def own_macs(
    reducer: Reducer,
    shape: tuple[int, int],
    entry: tuple[int, int],
    lengths: Sequence[tuple[int, int]],
    grid: Grid | None,
    place: str,
    cross: bool = False,
    parts: nn.ModuleDict | None = None,
    encoder: Encoder | None = None,
    prefix: int = 1,
) -> dict[int, int]:
    """MACs of planning and of applying the plan, before the first layer and in every one.

    Counted by letting the reducer run on tokens without content, so that it holds for every method. A CPU is counted
    as it is; for anything else tensors that have shapes and no data do.

    Args:
        reducer: the method.
        shape: (heads, channels of a head).
        entry: (text, image) tokens before anything is reduced.
        lengths: those before the first layer and after every one.
        grid: rows and columns of patches.
        place: device for the tokens, "cpu" or "meta".
        cross: as in `Tokens`.
        parts: what a learned reducer has trained, by layer.
        encoder: what it is told of a vision encoder, without content.
        prefix: structure tokens at the head of each modality.
    """
    heads, channels = shape
    macs = {}
    for layer, (text, image) in enumerate([entry, *lengths[:-1]], start=EMBEDDINGS):
        if not reducer.reduces_at(layer):
            macs[layer] = 0
            continue
        count = text + image
        seen = (text, image) if cross else (count, count)
        states = torch.ones(1, count, heads * channels, device=place)
        heads_apart = None if layer == EMBEDDINGS else states.view(1, count, heads, channels).transpose(1, 2)
        mask = torch.ones(1, count, device=place, dtype=torch.float32 if reducer.needs_attention else torch.bool)
        tokens = Tokens(
            mask_BN=mask,
            text=text,
            sizes_BN=torch.ones(1, count, device=place),
            layer=layer,
            prefix=prefix,
            grid=grid,
            patch_BN=(torch.arange(count, device=place) - text - prefix).clamp_min(-1)[None],
            states_BND=states,
            queries_BHNC=heads_apart,
            keys_BHNC=heads_apart,
            attention_BHNN=torch.ones(1, heads, *seen, device=place) if reducer.needs_attention else None,
            cross=cross,
            encoder=encoder if layer == EMBEDDINGS else None,
            part=copy.deepcopy(parts[str(layer)]).to(place, torch.float32).eval() if parts is not None else None,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            reducer.plan(tokens).reduce(states)
        macs[layer] = counter.get_total_flops() // 2
        grid = None
    return macs
