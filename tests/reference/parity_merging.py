"""ToMe, DyMU and DynamicViT against outputs of their published code.

Merged tokens stand in another order here: that of the tokens, where the published code of ToMe and
DyMU has the unmerged sources first, then the destinations. So groups are compared, and what became
of each.
"""

from __future__ import annotations

import torch
from selector_parity import Case
from torch import Tensor

from pumer.reducers import DyMU, DynamicViT, Plan, Reducer, Tokens, ToMe
from pumer.reducers.dynamicvit import Predictor


def run_tome(case: Case) -> None:
    """`r` tokens of one layer are merged away."""
    _check_merging(case, ToMe(r=case.settings["r"], depth=1))


def run_dymu(case: Case) -> None:
    """What is more alike than `threshold` is merged."""
    _check_merging(case, DyMU(thresholds=(case.settings["threshold"],)))


def run_dynamicvit(case: Case) -> None:
    """Scores of every patch, and the best `ratio` of those at the start, which stay at
    inference."""
    states, present = case.inputs["states"], case.inputs["policy"].bool()
    predictor = _predictor(case, states.shape[1])
    with torch.no_grad():
        scores = predictor(states[None], present[None])[0]
    torch.testing.assert_close(scores, case.outputs["scores"], rtol=1e-5, atol=1e-5)
    if not present.all():  # as while training, where what is gone is masked and still gets a score
        return
    # The second stage of a ratio of .7 has .49 of the start.
    stage = 2 if len(states) < case.settings["tokens_at_start"] else 1
    reducer = DynamicViT(keep=case.settings["ratio"] ** (1 / stage), layers=tuple(range(stage)))
    tokens = Tokens(
        mask_BN=torch.ones(1, 1 + len(states), dtype=torch.bool),
        text=0,
        sizes_BN=torch.ones(1, 1 + len(states)),
        layer=stage - 1,
        states_BND=torch.cat([torch.zeros(1, states.shape[1]), states])[None],
        entered_BI=torch.ones(1, case.settings["tokens_at_start"], dtype=torch.bool),
        part=predictor,
    )
    with torch.no_grad():
        plan = reducer.plan(tokens)
    assert (plan.slot_BN[0, 1:] >= 0).nonzero()[:, 0].tolist() == case.outputs["keep"].tolist()


def _predictor(case: Case, width: int) -> Predictor:
    """Ours with the published weights: one sequence here, two there."""
    predictor = Predictor(width, whole=True)
    weights = {}
    for name, tensor in case.inputs.items():
        if name.startswith("w."):
            _, part, layer, parameter = name.split(".")
            weights[f"layers.{int(layer) + (3 if part == 'out_conv' else 0)}.{parameter}"] = tensor
    predictor.load_state_dict(weights)
    return predictor


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
        num_prefix_tokens=int(case.settings["class_token"]),
        states_BND=features[None],
        keys_BHNC=keys[None, None],
    )
    return reducer.plan(tokens) if 0 in reducer.layers else Plan.identity(tokens.mask_BN)


def _groups(slots: Tensor, count: int) -> Tensor:
    """Bool [slots, sources]."""
    return slots == torch.arange(count)[:, None]


RUNNERS = {"tome": run_tome, "dymu": run_dymu, "dynamicvit": run_dynamicvit}
