"""Measure packed rows: which attention is fastest, and whether time falls as FLOPs do.

    OMP_WAIT_POLICY=passive python benchmarks/scripts/packing.py [MODEL] [BATCH] [ROUNDS]

First prints the milliseconds of one attention of 32 rows of 40 to 185 tokens, width 768 in 12
heads, computed in several ways. Then a model of random weights (vilt-b32, meter-base), padded and
packed, on images from smooth to busy, with methods that decide by sample; SmartTrim's trimmers are
random. All take turns. "Of FLOPs" is the time saved, of the unreduced padded model's, as a share of
the FLOPs saved. Seconds are those of the process (all threads) and of the clock, the least of all
rounds: other work on a machine disturbs the first less than the second.
"""

import copy
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pumer
from pumer.adapters.encoder.packing import Rows
from pumer.costs.report import last_forward_macs
from pumer.lab.bench import models
from pumer.reducers import Reducer

HEADS = 12
TAU, THRESHOLD, KEEP_BIAS = 0.99, 0.7, 3.5


def least(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """The least (process, clock) seconds of every call, which take turns; the first is warm-up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time(), time.perf_counter()
            call()
            seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {
        name: (min(process for process, _ in each[1:]), min(clock for _, clock in each[1:]))
        for name, each in seconds.items()
    }


def attention(rounds: int = 8) -> None:
    """Prints the milliseconds of every way to attend within ragged rows."""
    random.seed(0)
    lengths = [random.randint(40, 185) for _ in range(32)]
    batch, width, tokens = len(lengths), max(lengths), sum(lengths)
    mask_BN = torch.arange(width) < torch.tensor(lengths)[:, None]
    rows = Rows(mask_BN.flatten().nonzero()[:, 0], batch, width, tuple(lengths))
    row_P, offsets = rows.row_P, torch.tensor([0, *lengths]).cumsum(0)
    inputs = [torch.randn(1, tokens, 64 * HEADS) for _ in range(3)]
    attend = nn.functional.scaled_dot_product_attention

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    padded = [heads(rows.pad(x)) for x in inputs]
    bias, block = mask_BN[:, None, None], (row_P == row_P[:, None])[None, None]

    def row_by_row() -> Tensor:
        split = zip(*(heads(x).split(lengths, 2) for x in inputs), strict=True)
        return torch.cat([joined(attend(*row)) for row in split], 1)

    def put_back() -> Tensor:
        context = attend(*(heads(rows.pad(x)) for x in inputs), attn_mask=bias)
        return rows.pack(joined(context))

    def nested() -> Tensor:
        ragged = (torch.nested.nested_tensor_from_jagged(x[0], offsets) for x in inputs)
        return joined(attend(*map(heads, ragged))).values()[None]

    calls = {
        "padded, with a mask": lambda: joined(attend(*padded, attn_mask=bias)),
        "row by row": row_by_row,
        "padding put back, with a mask": put_back,
        "nested tensors, jagged": nested,
        "all rows under a block mask": lambda: joined(attend(*map(heads, inputs), attn_mask=block)),
    }
    with torch.no_grad():
        for name, call in calls.items():
            if name != "padded, with a mask":
                torch.testing.assert_close(call(), row_by_row())
        times = least(calls, rounds)
    print(f"attention of {batch} rows, {min(lengths)} to {width} tokens, {tokens} in all")
    for name, (process, _) in times.items():
        print(f"{name:32}{1e3 * process:8.1f} ms")


def reduced(net: nn.Module, reducer: Reducer, pack: bool) -> nn.Module:
    """The model with a reducer, sharing its weights; trimmers decide at random, mostly to keep."""
    weights = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    torch.manual_seed(5)
    model = pumer.apply(copy.deepcopy(net, weights), reducer, pack=pack)
    parts = pumer.active(model).parts
    if parts is not None:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, weight in parts.named_parameters():
                if name.endswith("decision.weight"):
                    weight.normal_(std=0.5)
                elif name.endswith("decision.bias"):
                    weight.copy_(torch.tensor([KEEP_BIAS, 0.0]))
    return model


def main(kind: str = "vilt-b32", batch: int = 32, rounds: int = 3) -> None:
    attention()
    net = models.build(kind)
    data = models.inputs(net, batch, busier=True)
    depth = pumer.adapters.find(net).depth(net)
    reducers = {
        "unreduced": pumer.Unreduced(),
        "energy": pumer.Energy(tau=TAU, most=0.9),
        "dymu": pumer.DyMU(thresholds=(THRESHOLD,) * depth),
        "smarttrim": pumer.SmartTrim(),
    }
    nets = {
        f"{name}{', packed' * pack}": reduced(net, reducer, pack)
        for name, reducer in reducers.items()
        for pack in (False, True)
    }
    outputs = {}

    def call(name: str) -> None:
        with torch.inference_mode():
            outputs[name] = nets[name](**data).logits

    seconds = least({name: lambda name=name: call(name) for name in nets}, rounds)
    threads = torch.get_num_threads()
    print(f"\n{kind}, batch {batch}, {threads} threads, least of {rounds} rounds")
    titles = ("GMACs", "saved", "process s", "saved", "of FLOPs", "clock s")
    widths = (7, 7, 11, 7, 10, 9)
    print(" " * 20 + "".join(map(str.rjust, titles, widths)))
    base, base_seconds = last_forward_macs(nets["unreduced"]), seconds["unreduced"][0]
    for name, (process, clock) in seconds.items():
        macs = last_forward_macs(nets[name])
        fewer, faster = 1 - macs / base, 1 - process / base_seconds
        share = f"{faster / fewer:.2f}" if fewer > 0.05 else ""
        line = f"{name:20}{macs / 1e9:7.2f}{fewer:7.3f}{process:11.2f}{faster:7.3f}"
        print(f"{line}{share:>10}{clock:9.2f}")
        torch.testing.assert_close(
            outputs[name], outputs[name.removesuffix(", packed")], rtol=0, atol=1e-5
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
