"""What every reducer promises, tried on random tokens in random settings.

    python tests/reducers/fuzz_reducers.py --inputs 10000
    python tests/reducers/fuzz_reducers.py --reducer dart --seed 4711

The first prints a table of broken promises by reducer; the second tries one input and says what
it was. `test_fuzz_reducers` runs some of them.

Shape suffixes: B batch, N source tokens, K slots, D channels.
"""

from __future__ import annotations

import argparse
import copy
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from random import Random as Generator

import torch
from fuzz_inputs import Batch, some_batch, tensors, with_values
from fuzz_settings import OFFICIAL, SETTINGS, members, some_reducer
from torch import Tensor

from pumer.reducers import Plan, Reducer, Tokens, TokenShape
from pumer.reducers.tokens import Grid

PERTURBATIONS = 6
"""How often a choice is made again with its values off by rounding, before it counts as unlike."""
LOGITS = ("queries", "keys", "context.keys")
"""Tensors whose products go through a softmax."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of reduced features, relative to the largest feature of the row."""


def some_input(name: str, seed: int) -> tuple[Reducer, Batch, Batch, int | None]:
    """A reducer, tokens, and the same tokens with one row of NaN or infinite values; that row."""
    rng = Generator(f"{name} {seed}")
    reducer = some_reducer(name, rng)
    layers = reducer.layers or (0,)
    batch = some_batch(reducer, rng.choice(layers), rng)
    row = rng.randrange(len(batch.counts)) if rng.random() < 0.4 else None
    return reducer, batch, poisoned(batch, row, rng), row


def poisoned(batch: Batch, row: int | None, rng: Generator) -> Batch:
    """The batch with NaN or infinite values in a row: everywhere, in a token or in one value."""
    if row is None:
        return batch
    poison = rng.choice([torch.nan, torch.nan, torch.inf, -torch.inf])
    extent, share = rng.choice(["all", "token", "value"]), rng.choice([0.5, 1.0])
    indices = batch.indices(row).tolist()
    token = rng.choice(indices) if indices else 0

    def change(name: str, x: Tensor) -> Tensor:
        if rng.random() > share or x[row].numel() == 0:
            return x
        x = x.clone()
        suffix = name.rsplit("_", 1)[1]
        dim = next(suffix.index(letter) for letter in "NMTI" if letter in suffix) - 1
        position = token if x.shape[dim + 1] > token else 0
        if extent == "all":
            x[row] = poison
        elif extent == "token":
            x[row].select(dim, position).fill_(poison)
        else:
            value = x[row].select(dim, position)
            while value.ndim:
                value = value[0]
            value.fill_(poison)
        return x

    return replace(batch, tokens=with_values(batch.tokens, change))


def broken(
    reducer: Reducer, batch: Batch, with_nan: Batch, nan_row: int | None = None
) -> Iterator[str]:
    """Names of the promises that do not hold for one input; "tie" is none of them.

    A tie is a choice that differs between a row in its batch and the row alone, and also when
    values of the row alone change by the rounding of float32: products of matrices of other
    shapes are summed in another order.
    """
    try:
        plan = yield from planned(reducer, batch.tokens)
        yield from structure(reducer, batch, plan)
        yield from finite(reducer, batch, plan)
        if not (reducer.traits.official or batch.overflows):
            for row in range(len(batch.counts)):
                yield from alone(reducer, batch, plan, row)
        if nan_row is not None:
            nan_plan = yield from planned(reducer, with_nan.tokens)
            faults = structure(reducer, with_nan, nan_plan, nan_row)
            yield from (f"{fault} (NaN)" for fault in faults)
            if not same_elsewhere(batch, plan, with_nan, nan_plan, nan_row):
                yield "NaN spreads"
    except Exception as error:
        # The published code cannot merge what is too short, and says so.
        if not (reducer.traits.official and isinstance(error, ValueError)):
            yield type(error).__name__


def planned(reducer: Reducer, tokens: Tokens) -> Iterator[str]:
    """Makes the plan, and sees that no tensor was written to."""
    versions = {key: value._version for key, value in tensors(tokens).items()}
    with torch.no_grad():
        plan = reducer.plan(tokens)
    if versions != {key: value._version for key, value in tensors(tokens).items()}:
        yield "writes to its inputs"
    return plan


def structure(
    reducer: Reducer, batch: Batch, plan: Plan, nan_row: int | None = None
) -> Iterator[str]:
    """What holds for the slots, masks and shares of a plan."""
    tokens = batch.tokens
    layer, num_prefix_tokens = tokens.layer, tokens.num_prefix_tokens
    rows, count = tokens.mask_BN.shape
    shape = (tokens.text, count - tokens.text, layer, num_prefix_tokens, tokens.grid)
    text, image = promise(reducer, tokens, shape, None)
    slots = text + image
    if plan.slots != slots:
        yield "length"
        return
    if plan.slot_BN.shape != (rows, count) or plan.slot_BN.dtype != torch.int64:
        yield "shape"
        return
    if count and not -1 <= int(plan.slot_BN.min()) <= int(plan.slot_BN.max()) < slots:
        yield "slot range"
        return
    mask_BK = plan.mask_BK > 0
    sources_BKN = plan.sources()
    index_BK = plan.index_BK
    if index_BK is not None:
        if bool((index_BK < 0).any() | (index_BK >= count).any()):
            yield "index range"
        elif not torch.equal(
            plan.slot_BN.gather(1, index_BK)[mask_BK],
            torch.arange(slots).expand(rows, slots)[mask_BK],
        ):
            yield "index"
        if bool((sources_BKN.sum(2) > 1).any()):
            yield "selection with two sources"
    if reducer.traits.official:
        return
    valid_BN = tokens.valid_BN
    if not torch.equal((sources_BKN & valid_BN[:, None]).any(2), mask_BK):
        yield "mask"
    if bool(((plan.matrix() != 0) & ~valid_BN[:, None] & mask_BK[..., None]).any()):
        yield "padding merged"
    for row, (words, patches) in enumerate(batch.counts):
        grid = None if batch.grids is None else batch.grids[row]
        promised = promise(reducer, tokens, (words, patches, layer, num_prefix_tokens, grid), row)
        axes = ((0, tokens.text, 0, text), (tokens.text, count, text, slots))
        for axis, (start, _, low, high) in enumerate(axes):
            filled = mask_BK[row, low:high]
            kept = int(filled.sum())
            real = (words, patches)[axis]
            slot_N = plan.slot_BN[row, start : start + real]
            if bool(((slot_N >= 0) & ((slot_N < low) | (slot_N >= high))).any()):
                yield "modality"
            if bool((filled[1:] & ~filled[:-1]).any()):
                yield "padding before tokens"
            if kept > promised[axis] or (
                kept < promised[axis] and not reducer.traits.dynamic_length
            ):
                yield "count"
            if (
                real > num_prefix_tokens
                and axis
                and kept <= num_prefix_tokens
                and not reducer.traits.drops_image
            ):
                yield "no image token"
            if num_prefix_tokens and real and promised[axis]:
                heads = sources_BKN[row, low, start : start + real]
                if int(slot_N[0]) != low or int(heads.sum()) != 1:
                    yield "structure token"
    if not adds(reducer):
        share_BK = plan.total(plan.weight_BN)
        share_BK = share_BK if nan_row is None else share_BK.index_fill(0, torch.tensor(nan_row), 1)
        if not torch.allclose(share_BK[mask_BK], torch.ones(()), atol=1e-5):
            yield "weights"


def promise(
    reducer: Reducer, tokens: Tokens, shape: tuple[int, int, int, int, Grid | None], row: int | None
) -> tuple[int, int]:
    """(text, image) tokens that a row of this shape has afterwards; of the whole batch without a
    row."""
    if tokens.entered_BI is None:
        return reducer.lengths(TokenShape(*shape))
    num_prefix_tokens = shape[3]  # counted by `lengths`, and no part of the mask
    width = tokens.entered_BI.shape[1]
    entered = width if row is None else int(tokens.entered_BI[row].sum())
    return reducer.lengths(TokenShape(*shape, entered=num_prefix_tokens + entered))


def finite(reducer: Reducer, batch: Batch, plan: Plan) -> Iterator[str]:
    """Shares and reduced features are finite; what adds up may exceed float16."""
    states_BND = batch.tokens.states_BND
    if not bool(plan.weight_BN.isfinite().all()):
        yield "weights not finite"
    may_overflow = states_BND.dtype == torch.float16 and adds(reducer)
    reduced = plan.reduce(states_BND)[plan.mask_BK > 0]
    if not may_overflow and not bool(reduced.isfinite().all()):
        yield "not finite"


def adds(reducer: Reducer) -> bool:
    """Whether shares of a slot need not sum to one: the published method adds tokens up."""
    return any(
        part.traits.official
        or part.name in ("prumerge", "visionzip")
        or getattr(part, "merge", None) == "sum"
        for part in members(reducer)
    )


def in_order(plan: Plan, row: int, index: Tensor) -> Tensor:
    """Slots of the real tokens of a row, counted among the filled ones; -1 where dropped."""
    filled_K = plan.mask_BK[row] > 0
    slot_K = torch.where(filled_K, filled_K.long().cumsum(0) - 1, -2)
    slot_N = plan.slot_BN[row, index]
    return torch.where(slot_N < 0, -1, torch.cat([slot_K, slot_K.new_zeros(1)])[slot_N])


def alone(reducer: Reducer, batch: Batch, plan: Plan, row: int) -> Iterator[str]:
    """A row of a batch keeps and merges what it does without its padding and its neighbours."""
    single = batch.alone(row)
    if single.tokens.mask_BN.shape[1] == 0:
        return
    single_plan = yield from planned(reducer, single.tokens)
    index = batch.indices(row)
    everything = torch.arange(len(index))
    slot_N, single_slot_N = in_order(plan, row, index), in_order(single_plan, 0, everything)
    if not torch.equal(slot_N, single_slot_N):
        yield "tie" if is_tie(reducer, single) else "row alone"
        return
    states_BND = batch.tokens.states_BND
    reduced_KD = plan.reduce(states_BND)[row][plan.mask_BK[row] > 0].float()
    single_KD = single_plan.reduce(single.tokens.states_BND)[0].float()
    single_KD = single_KD[single_plan.mask_BK[0] > 0]
    if single_KD.numel() and bool(single_KD.isfinite().all()):
        scale = single_KD.abs().amax().clamp_min(1e-37)
        error = ((reduced_KD - single_KD) / scale).abs().amax()
        if not error <= TOLERANCE[states_BND.dtype]:
            yield "features alone"


def is_tie(reducer: Reducer, single: Batch) -> bool:
    """Whether values that differ by rounding change what is chosen of a row."""
    seed = torch.Generator().manual_seed(0)
    everything = torch.arange(single.tokens.mask_BN.shape[1])
    dtype = single.tokens.states_BND.dtype
    widened = replace(single.tokens, part=copy.deepcopy(single.tokens.part))
    if widened.part is not None:
        widened.part.float()
    widened = with_values(widened, lambda name, x: x.float())
    # What is computed in half precision is rounded more coarsely.
    for tokens, eps in ((widened, 1e-6), (single.tokens, torch.finfo(dtype).eps)):

        def off(name: str, x: Tensor, eps: float = eps) -> Tensor:
            # Logits of a softmax and of trained parts are read on a scale of 1, others on their
            # own.
            logits = name.split("_")[0] in LOGITS
            x_size = x.float().abs()
            scale = x_size.clamp_min(1) if logits or reducer.traits.learned else x.float()
            if logits and x.numel() and float(x_size.max()) < 100:
                # Of products of small ones nothing but the rounding of equal shares is left.
                scale = torch.where(x_size < 1e-3, 1e-3 / eps, scale)
            noise = eps * scale * torch.randn(x.shape, generator=seed)
            return (x.float() + noise).clamp(-3e38, 3e38).to(x.dtype)

        choices = {tuple(in_order(reducer.plan(tokens), 0, everything).tolist())}
        for _ in range(PERTURBATIONS):
            plan = reducer.plan(with_values(tokens, off))
            choices.add(tuple(in_order(plan, 0, everything).tolist()))
            if len(choices) > 1:
                return True
    return False


def same_elsewhere(batch: Batch, plan: Plan, with_nan: Batch, nan_plan: Plan, row: int) -> bool:
    """Whether all rows but one have the same plan and features, bit for bit."""
    others = [other for other in range(len(batch.counts)) if other != row]
    filled = plan.mask_BK[others] > 0
    parts = []
    for some, some_plan in ((batch, plan), (with_nan, nan_plan)):
        if some_plan.mask_BK.shape != plan.mask_BK.shape:
            return False
        reduced_BKD = some_plan.reduce(some.tokens.states_BND)[others]
        choice = (some_plan.slot_BN, some_plan.weight_BN, some_plan.mask_BK)
        parts.append([*(x[others] for x in choice), reduced_BKD[filled]])
    return all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def compiled_alike(reducer: Reducer, tokens: Tokens) -> bool:
    """Whether `torch.compile` makes the same plan."""
    torch._dynamo.reset()
    compiled = torch.compile(reducer.plan, backend="aot_eager")
    with torch.no_grad():
        plan, expected = compiled(tokens), reducer.plan(tokens)
    pairs = (plan.slot_BN, expected.slot_BN), (plan.mask_BK, expected.mask_BK)
    return all(torch.equal(x, y) for x, y in pairs)


def compiles(name: str, seeds: range = range(2)) -> bool:
    """Whether a few inputs have the same plan when compiled."""
    for seed in seeds:
        reducer, batch, _, _ = some_input(name, seed)
        if not compiled_alike(reducer, batch.tokens):
            return False
    return True


def describe(name: str, seed: int) -> str:
    """An input in words, and the traceback if it raises."""
    reducer, batch, with_nan, nan_row = some_input(name, seed)
    tokens = batch.tokens
    lines = [
        repr(reducer),
        f"layer {tokens.layer}, text {tokens.text}, shape {tuple(tokens.mask_BN.shape)}, "
        f"prefix {tokens.num_prefix_tokens}, grid {tokens.grid}, cross {tokens.cross}, "
        f"causal {tokens.place_BN is not None}, context {tokens.context is not None}, "
        f"{tokens.states_BND.dtype}, (text, image) {batch.counts}, grids {batch.grids}, "
        f"row with NaN {nan_row}",
    ]
    try:
        for some in (batch, with_nan, *(batch.alone(row) for row in range(len(batch.counts)))):
            reducer.plan(some.tokens)
    except Exception:
        lines.append(traceback.format_exc())
    return "\n".join(lines)


def sweep(name: str, seeds: range) -> tuple[Counter, dict[str, int]]:
    """How often every promise is broken, and the first input that breaks it."""
    counts: Counter = Counter()
    first: dict[str, int] = {}
    for seed in seeds:
        for fault in dict.fromkeys(broken(*some_input(name, seed))):
            counts[fault] += 1
            first.setdefault(fault, seed)
    return counts, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=200, help="inputs for every reducer")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--reducer", nargs="*", default=[*SETTINGS, *OFFICIAL])
    parser.add_argument("--seed", type=int, help="try and describe this input alone")
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    totals: dict[str, int] = defaultdict(int)
    for name in arguments.reducer:
        if arguments.seed is not None:
            print(describe(name, arguments.seed))
            print(", ".join(broken(*some_input(name, arguments.seed))) or "nothing broken")
            continue
        counts, first = sweep(name, range(arguments.first, arguments.first + arguments.inputs))
        if arguments.compile and name in SETTINGS and not compiles(name):
            counts["compiled otherwise"] = 1
            first["compiled otherwise"] = 0
        faults = [f"{fault} {count} (seed {first[fault]})" for fault, count in counts.most_common()]
        print(f"{name:20} {arguments.inputs:6}  {'; '.join(faults) or '-'}", flush=True)
        for fault, count in counts.items():
            totals[fault] += count
    print("all", dict(totals))


if __name__ == "__main__":
    main()
