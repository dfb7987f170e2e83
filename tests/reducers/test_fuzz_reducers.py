"""Every reducer keeps its promises on random tokens, and broken promises are noticed.

`PUMER_FUZZ=10000 pytest tests/reducers/test_fuzz_reducers.py` tries more than 80 inputs of each
reducer.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from fuzz_inputs import some_batch
from fuzz_reducers import broken, compiles, describe, poisoned, sweep
from fuzz_settings import OFFICIAL, SETTINGS, Generator

from pumer.reducers import Plan, Reducer, list_reducers

INPUTS = int(os.environ.get("PUMER_FUZZ", "80"))
COMPILED = ("pumer", "tome", "fastv", "divprune", "visionzip", "sparsevlm")


def test_every_reducer_is_tried():
    assert set(SETTINGS) == set(list_reducers())


@pytest.mark.parametrize("name", [*SETTINGS, *OFFICIAL])
def test_promises_hold(name):
    counts, first = sweep(name, range(INPUTS))
    ties = counts.pop("tie", 0)
    faults = {fault: (count, first[fault]) for fault, count in counts.items()}
    first_seed = min((first[fault] for fault in counts), default=0)
    assert not faults, f"{faults}, the first of them:\n{describe(name, first_seed)}"
    assert ties <= INPUTS // 20


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_plans_are_the_same_when_compiled(name):
    assert compiles(name)


# --- the checks above, on a reducer that breaks its promises ---


@dataclass(frozen=True)
class Faulty(Reducer):
    """Leaves everything but for its fault."""

    name = "faulty"
    fault: str = ""

    @property
    def layers(self):
        return (0,)

    def lengths(self, shape):
        return shape.unchanged

    def plan(self, tokens):
        plan = Plan.identity(tokens.valid_BN)
        slot_BN, valid_BN = plan.slot_BN.clone(), tokens.valid_BN
        match self.fault:
            case "slot range":
                slot_BN[-1, -1] = plan.slots
            case "length":
                return Plan.side_by_side([plan, plan])
            case "index":
                return replace(plan, index_BK=plan.index_BK.flip(1))
            case "padding merged":
                return replace(plan, slot_BN=slot_BN.where(valid_BN, 0), index_BK=None)
            case "padding before tokens":
                slot_BN = slot_BN.flip(1)
                return Plan(slot_BN, plan.weight_BN, plan.mask_BK.flip(1))
            case "count" | "structure token":
                keep_BN = valid_BN.clone()
                keep_BN[:, tokens.text if self.fault == "structure token" else -1] = False
                return Plan.keep(keep_BN, plan.slots)
            case "no image token":
                keep_BN = valid_BN & (
                    torch.arange(plan.slots) < tokens.text + tokens.num_prefix_tokens
                )
                return Plan.keep(keep_BN, plan.slots)
            case "weights":
                return replace(plan, weight_BN=plan.weight_BN * 2, index_BK=None)
            case "weights not finite":
                return replace(plan, weight_BN=plan.weight_BN / 0, index_BK=None)
            case "writes to its inputs":
                tokens.sizes_BN.add_(0)
            case "row alone":
                order_BN = torch.where(valid_BN, tokens.states_BND.sum((0, 2)), torch.inf)
                order_BN[:, : tokens.text] = -torch.inf
                index_BN = order_BN.argsort(dim=1, stable=True)
                return Plan.select(index_BN, valid_BN, plan.slots)
            case "NaN spreads":
                share = tokens.states_BND.float().sum()
                return replace(plan, weight_BN=plan.weight_BN + share * 0, index_BK=None)
            case "RuntimeError":
                raise RuntimeError
        return replace(plan, slot_BN=slot_BN)


FAULTS = [
    "slot range",
    "length",
    "index",
    "padding merged",
    "padding before tokens",
    "count",
    "structure token",
    "no image token",
    "weights",
    "weights not finite",
    "writes to its inputs",
    "row alone",
    "NaN spreads",
    "RuntimeError",
]


def faults_of(reducer, inputs=60):
    rng = Generator(0)
    for _ in range(inputs):
        batch = some_batch(reducer, 0, rng)
        row = rng.randrange(len(batch.counts))
        yield from broken(reducer, batch, poisoned(batch, row, rng), row)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_promise_is_seen(fault):
    assert fault in set(faults_of(Faulty(fault)))


def test_what_changes_nothing_breaks_no_promise():
    assert not set(faults_of(Faulty()))
