"""Every reducer in one or two settings that do something in a model of `tiny.LAYERS` layers."""

import pytest
import tiny

import halves
from pumer import Compose, NoVision, Pool, PuMer, Random, Reducer, ToMe, Uniform, Unreduced
from pumer.reducers import (
    DART,
    VTW,
    CDPruner,
    Chain,
    DivPrune,
    DyMU,
    DynamicViT,
    Energy,
    PyramidDrop,
    SmartTrim,
    SparseVLM,
    SVDPrune,
    list_reducers,
)

REDUCERS: dict[str, Reducer] = {
    "none": Unreduced(),
    "pumer": PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(1, 2)),
    "pumer-smooth": PuMer(
        prune=0.2,
        merge=(0.1, 0.3, 0.3),
        merge_text=0.2,
        layers=(0, 1, 2),
        smooth=0.5,
        proportional=True,
    ),
    "pumer-qk": PuMer(prune=0.1, merge=0.4, merge_text=0.2, layers=(0,), score="qk"),
    "tome": ToMe(r=3, depth=4, proportional=True),
    "tome-decreasing": ToMe(r=(4, -1.0), depth=3, proportional=False),
    "random": Random(prune=0.4, layers=(-1, 2), seed=1),
    "uniform": Uniform(prune=0.5, layers=(0, 1)),
    "pool": Pool(window=2),
    "pool-inside": Pool(window=3, layer=1),
    "no-vision": NoVision(),
    "vtw": VTW(layer=2),
    "dynamicvit": DynamicViT(keep=0.6, layers=(0, 2)),
    "smarttrim": SmartTrim(layers=(0, 1, 3)),
    "smarttrim-image": SmartTrim(layers=(1, 2), text=False, heads=False),
    "divprune": DivPrune(keep=0.4),
    "cdpruner": CDPruner(keep=0.5),
    "svd-prune": SVDPrune(keep=0.5, features="states"),
    "dart": DART(keep=0.5, layer=1),
    "pyramiddrop": PyramidDrop(keep=(0.7, 0.4), layers=(0, 2)),
    "sparsevlm": SparseVLM(keep=(0.5, 0.6), layers=(1, 2), merge="rating"),
    "energy": Energy(DivPrune(), tau=0.8, least=2, most=0.7),
    "dymu": DyMU(thresholds=(0.3, 1.0, 0.5)),
    "divprune+pyramiddrop": Chain((DivPrune(keep=0.6), PyramidDrop(keep=(0.5,), layers=(1,)))),
}
COMPOSED: dict[str, Reducer] = {
    "tome+pumer": Compose(
        ToMe(r=4, depth=tiny.TOWER), PuMer(prune=0.2, merge=0.2, merge_text=0.3, layers=(0, 2))
    ),
    "tome+tome": Compose(ToMe(r=3, depth=2, proportional=False), ToMe(r=2, depth=4)),
    "uniform+random": Compose(Uniform(prune=0.3, layers=(0, 2)), Random(prune=0.3)),
}
"""Two at once, for models with a vision tower of `tiny.TOWER` layers."""
OFFICIAL = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(1, 2), official=True)
"""The published code's mode: it keeps none of the rules on padding, so the shared tests leave it
out."""
IDENTITIES: dict[str, Reducer] = {
    "none": Unreduced(),
    "pumer": PuMer(prune=0, merge=0, merge_text=0, layers=(1, 2)),
    "tome": ToMe(r=0, depth=4),
    "random": Random(prune=0, layers=(-1, 1)),
    "uniform": Uniform(prune=0, layers=(-1, 1)),
    "pool": Pool(window=1, layer=0),
    "divprune": DivPrune(keep=1.0),
    "svd-prune": SVDPrune(keep=1000, features="states"),
    "dart": DART(keep=1.0, layer=1),
    "pyramiddrop": PyramidDrop(keep=(1.0, 1.0), layers=(0, 2)),
    "sparsevlm": SparseVLM(keep=(1.0,), layers=(1,)),
    "dymu": DyMU(thresholds=(0.9999, 0.9999)),
}
"""The same at ratio 0, where nothing may change."""
PRUNING: dict[str, Reducer] = {
    "pumer": PuMer(prune=0.4, merge=0, merge_text=0, layers=(1,)),
    "pumer-twice": PuMer(prune=0.3, merge=0, merge_text=0, layers=(0, 2), score="k_metric"),
    "random": Random(prune=0.5),
    "uniform": Uniform(prune=0.4, layers=(0, 2)),
    "no-vision": NoVision(),
    "vtw": VTW(layer=3),
    "dynamicvit": DynamicViT(keep=0.6, layers=(0, 2)),
    "smarttrim": SmartTrim(layers=(0, 1, 3), heads=False),
    "divprune": DivPrune(keep=0.5),
    "cdpruner": CDPruner(keep=0.3),
    "dart": DART(keep=0.4, layer=1),
    "pyramiddrop": PyramidDrop(keep=(0.6, 0.3), layers=(0, 2)),
    "sparsevlm": SparseVLM(keep=(0.5,), layers=(1,), recycle=False),
}
"""Those that only drop tokens."""
ELSEWHERE = {"fastv", "fopru", "fastervlm", "vispruner", "visionzip", "prumerge", "holov", "scope"}
ELSEWHERE |= {"mmtok", "hiprune", "v2drop"}
"""Those that read a vision encoder's attention, or need a decoder: `test_selectors` and
`test_llm_oracle` have them."""


IN_EVERY_RUN = ("none", "pumer", "tome", "energy", "smarttrim", "dynamicvit", "tome+pumer")
"""Reducers that run every time on models of two streams, one of each kind; the others, which run
every time on ViLT, are slow tests there."""


def on_every_family(**more: Reducer) -> list:
    """Cases (kind of model, reducer): every reducer on every family, and what is given besides."""
    cases = [
        pytest.param(kind, reducer, id=f"{family}-{name}")
        for family, kind in tiny.FAMILIES.items()
        for name, reducer in (REDUCERS | ({} if family == "ViLT" else COMPOSED) | more).items()
    ]
    return halves.sweep(
        cases, lambda id: id.startswith("ViLT-") or id.split("-", 1)[1] in IN_EVERY_RUN
    )


def missing() -> set[str]:
    """Registered reducers that the matrix lacks."""
    return (
        set(list_reducers())
        - {reducer.name for reducer in (*REDUCERS.values(), *COMPOSED.values())}
        - ELSEWHERE
    )
