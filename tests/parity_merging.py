"""ToMe, DyMU and DynamicViT against outputs of their published code.

Merged tokens stand in another order here: that of the tokens, where the published code of ToMe and DyMU
has the unmerged sources first, then the destinations. So groups are compared, and what became of each.
"""

from __future__ import annotations

import torch
from selector_parity import Case
from torch import Tensor

from pumer.reducers import DynamicViT, DyMU, Plan, Reducer, Tokens, ToMe


def run_tome(case: Case) -> None:
    """`r` tokens of one layer are merged away."""
    _check_merging(case, ToMe(r=case.settings["r"], depth=1))


def run_dymu(case: Case) -> None:
    """What is more alike than `threshold` is merged."""
    _check_merging(case, DyMU(thresholds=(case.settings["threshold"],)))


def run_dynamicvit(case: Case) -> None:
    """Scores of every patch; at inference the best `ratio` of those at the start stay."""
    states = case.inputs["states"]
    policy = case.inputs["policy"].flatten()
    ratio, start = case.settings["ratio"], case.settings["tokens_at_start"]
    predictor = _predictor(case, states.shape[1])
    scores = predictor(states[None], policy[None].float())[0]
    torch.testing.assert_close(scores, case.outputs["scores"], rtol=1e-5, atol=1e-5)
    if "keep" not in case.outputs:  # as while training, where masks stay
        return
    present = policy.bool()
    reducer = DynamicViT(keep=ratio, layers=(0,))
    tokens = Tokens(
        mask_BN=torch.cat([torch.ones(1, dtype=torch.bool), torch.ones(int(present.sum()), dtype=torch.bool)])[None],
        text=0,
        sizes_BN=torch.ones(1, 1 + int(present.sum())),
        states_BND=torch.cat([torch.zeros(1, states.shape[1]), states[present]])[None],
        part=predictor,
    )
    assert start
    kept = reducer.plan(tokens).slot_BN[0, 1:] >= 0
    numbers = present.nonzero()[:, 0][kept]
    assert numbers.tolist() == case.outputs["keep"].tolist()


def _predictor(case: Case, width: int) -> torch.nn.Module:
    weights = {name.removeprefix("w."): tensor for name, tensor in case.inputs.items() if name.startswith("w.")}
    print({k: v.shape for k, v in weights.items()})
    raise SystemExit


def _check_merging(case: Case, reducer: Reducer) -> None:
    keys, features, sizes = (case.inputs[name] for name in ("keys", "features", "sizes"))
    plan = _plan(case, reducer, keys, features, sizes)
    ours, theirs = plan.sources()[0], _groups(case.outputs["slots"], len(case.outputs["features"]))
    same = (ours[:, None] == theirs).all(-1)  # [our slot, published slot]
    filled = plan.mask_BK[0]
    assert int(filled.sum()) == len(theirs)
    assert (same[filled].sum(1) == 1).all()
    assert (same.sum(0) == 1).all()
    order = same.long().argmax(0)
    merged = plan.reduce(features[None])[0, order]
    torch.testing.assert_close(merged, case.outputs["features"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.total(sizes[None])[0, order], case.outputs["sizes"])


def _plan(case: Case, reducer: Reducer, keys: Tensor, features: Tensor, sizes: Tensor) -> Plan:
    tokens = Tokens(
        mask_BN=torch.ones(1, len(keys), dtype=torch.bool),
        text=0,
        sizes_BN=sizes[None],
        prefix=int(case.settings["class_token"]),
        states_BND=features[None],
        keys_BHNC=keys[None, None],
    )
    return reducer.plan(tokens) if 0 in reducer.layers else Plan.identity(tokens.mask_BN)


def _groups(slots: Tensor, count: int) -> Tensor:
    """Bool [slots, sources]."""
    return slots == torch.arange(count)[:, None]


RUNNERS = {"tome": run_tome, "dymu": run_dymu, "dynamicvit": run_dynamicvit}
