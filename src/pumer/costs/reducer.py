"""The cost of a reducer itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pumer.reducers.base import Reducer
from pumer.reducers.tokens import EMBEDDINGS, Encoder, Grid, Tokens


@dataclass(frozen=True)
class ReducerCost:
    """The cost of planning and applying reductions, for one example.

    Args:
        macs: multiply-accumulates of its matrix products.
        traffic: bytes that its operators read and write, which dominates their time.
        operators: number of operators launched, independent of the batch size.
    """

    macs: int = 0
    traffic: int = 0
    operators: int = 0

    def __add__(self, other: ReducerCost) -> ReducerCost:
        return ReducerCost(
            self.macs + other.macs, self.traffic + other.traffic, self.operators + other.operators
        )

    def __rmul__(self, times: int) -> ReducerCost:
        return ReducerCost(times * self.macs, times * self.traffic, times * self.operators)


NO_COST = ReducerCost()


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators launched inside the with block, except views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = self.started = 0

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = operator(*args, **(kwargs or {}))
        if not operator.is_view and operator is not torch.ops.aten._unsafe_view.default:
            self.started += 1
            self.traffic += sum(
                x.nbytes for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor)
            )
        return output


def count_reducer_costs(
    reducer: Reducer,
    shape: tuple[int, int],
    entry: tuple[int, int],
    lengths: Sequence[tuple[int, int]],
    grid: Grid | None,
    device: str,
    cross: bool = False,
    parts: nn.ModuleDict | None = None,
    encoder: Encoder | None = None,
    num_prefix_tokens: int = 1,
) -> dict[int, ReducerCost]:
    """The reducer's cost before the first layer and in every layer.

    Counted by running the reducer on dummy tokens, so that it works for every method. On CPUs the
    tokens have data; for other devices "meta" tensors are used.

    Args:
        reducer: the method.
        shape: (heads, channels of a head).
        entry: (text, image) tokens before any reduction.
        lengths: (text, image) tokens before the first layer and after every layer.
        grid: rows and columns of patches.
        device: device of the dummy tokens, "cpu" or "meta".
        cross: as in `Tokens`.
        parts: trainable parts of a learned reducer, by layer.
        encoder: dummy outputs of a vision encoder.
        num_prefix_tokens: structure tokens at the head of each modality.
    """
    heads, channels = shape
    costs = {}
    for layer, (text, image) in enumerate([entry, *lengths[:-1]], start=EMBEDDINGS):
        if not reducer.reduces_at(layer):
            costs[layer] = NO_COST
            continue
        count = text + image
        attention_shape = (text, image) if cross else (count, count)
        states = torch.ones(1, count, heads * channels, device=device)
        heads_apart = (
            None if layer == EMBEDDINGS else states.view(1, count, heads, channels).transpose(1, 2)
        )
        mask = torch.ones(
            1,
            count,
            device=device,
            dtype=torch.float32 if reducer.traits.needs_attention else torch.bool,
        )
        tokens = Tokens(
            mask_BN=mask,
            text=text,
            sizes_BN=torch.ones(1, count, device=device),
            layer=layer,
            num_prefix_tokens=num_prefix_tokens,
            grid=grid,
            patch_BN=(torch.arange(count, device=device) - text - num_prefix_tokens).clamp_min(-1)[
                None
            ],
            states_BND=states,
            input_BND=states if reducer.traits.needs_input and layer != EMBEDDINGS else None,
            queries_BHNC=heads_apart,
            keys_BHNC=heads_apart,
            attention_BHNN=torch.ones(1, heads, *attention_shape, device=device)
            if reducer.traits.needs_attention
            else None,
            cross=cross,
            encoder=encoder if layer == EMBEDDINGS else None,
            entered_BI=torch.ones(
                1, max(lengths[0][1] - num_prefix_tokens, 0), dtype=torch.bool, device=device
            ),
            part=copy.deepcopy(parts[str(layer)]).to(device, torch.float32).eval()
            if parts is not None
            else None,
        )
        with FlopCounterMode(display=False) as flops, _Operators() as operators, torch.no_grad():
            reducer.plan(tokens).reduce(states)
        costs[layer] = ReducerCost(
            flops.get_total_flops() // 2, operators.traffic, operators.started
        )
        grid = None
    return costs
