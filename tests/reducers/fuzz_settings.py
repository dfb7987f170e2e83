"""Random valid settings of every registered reducer, for `fuzz_reducers`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random as Generator

from pumer.reducers import EMBEDDINGS, Reducer, get

DEPTH = 4
"""Layers of the model that the reducers act in."""
SALIENCY = ("class", "received")


def some_ratio(rng: Generator) -> float:
    """A ratio in [0, 1), its ends as often as all between."""
    return rng.choice([0, 0.0, 0.5, 0.999999, rng.random(), rng.random(), rng.random()])


def some_keep(rng: Generator) -> float | int:
    """A budget: a share in (0, 1] or a whole number, more than there are included."""
    share = 1 - rng.random()
    return rng.choice([1.0, 1e-9, 0.5, share, share, share, 1, 2, rng.randint(1, 60), 1000])


def some_layers(rng: Generator, first: int = 0) -> tuple[int, ...]:
    """One or more layers, in order."""
    return tuple(sorted(rng.sample(range(first, DEPTH), rng.randint(1, DEPTH - first))))


def stages(rng: Generator, falling: bool = False) -> dict:
    """A budget for each of some layers; `falling`: all shares or all numbers, never rising."""
    layers = some_layers(rng)
    keep = [some_keep(rng) for _ in layers]
    if falling:
        share = rng.random() < 0.5
        keep = [1 - rng.random() if share else rng.randint(1, 70) for _ in layers]
        keep.sort(reverse=True)
    return {"keep": tuple(keep), "layers": layers}


def pumer(rng: Generator) -> dict:
    prune = some_ratio(rng)
    merge = rng.choice([0.0, 0.3, rng.random()]) * (1 - prune)
    merge = 0.0 if prune + merge >= 1 else merge
    score = rng.choice(["mean_head", "first_head", "k_metric", "qk"])
    text = some_ratio(rng)
    return {
        "prune": prune,
        "merge": merge,
        "merge_text": text,
        "layers": some_layers(rng),
        "score": score,
    }


def pumer_beyond_the_paper(rng: Generator) -> dict:
    settings = pumer(rng)
    options = {
        "proportional": rng.random() < 0.5,
        "protect": some_ratio(rng),
        "weighted": rng.random() < 0.5,
        "smooth": some_ratio(rng) if settings["score"].endswith("head") else 0.0,
        "prune_below": some_ratio(rng),
    }
    settings |= {name: value for name, value in options.items() if rng.random() < 0.3}
    if rng.random() < 0.3:  # a share for every layer
        for name in ("prune", "merge"):
            settings[name] = tuple(settings[name] * rng.random() for _ in settings["layers"])
    return settings


def tome(rng: Generator) -> dict:
    tilted = (rng.randint(0, 30), rng.uniform(-1, 1))
    each = tuple(rng.randint(0, 40) for _ in range(rng.randint(1, DEPTH)))
    r = rng.choice([rng.randint(0, 70), tilted, each])
    return {"r": r, "depth": DEPTH, "proportional": rng.random() < 0.5}


def holov(rng: Generator) -> dict:
    return {
        "keep": some_keep(rng),
        "chunks": rng.choice([1, 2, 7, 16, 100, "auto"]),
        "saliency": rng.choice(SALIENCY),
    }


def fopru(rng: Generator) -> dict:
    strategy, fill = rng.choice(["rank", "row"]), rng.random() < 0.7
    whole_rows = strategy == "row" and not fill
    keep = 1 - rng.random() if whole_rows else some_keep(rng)
    return {
        "keep": keep,
        "strategy": strategy,
        "saliency": rng.choice([*SALIENCY, "variance"]),
        "fill": fill,
    }


def v2drop(rng: Generator) -> dict:
    layers = some_layers(rng)
    return {"keep": tuple(rng.choice([0.0, some_keep(rng)]) for _ in layers), "layers": layers}


def svd_prune(rng: Generator) -> dict:
    return {
        "keep": some_keep(rng),
        "energy": rng.uniform(0.01, 0.999),
        "mass": rng.choice([None, rng.uniform(0.01, 0.999)]),
        "features": rng.choice(["encoder", "states"]),
        "center": rng.random() < 0.5,
        "normalize": rng.random() < 0.5,
    }


def with_saliency(rng: Generator) -> dict:
    return {"keep": some_keep(rng), "saliency": rng.choice(SALIENCY)}


SELECTORS = [
    "cdpruner",
    "dart",
    "divprune",
    "fastervlm",
    "fastv",
    "fopru",
    "hiprune",
    "holov",
    "mmtok",
    "prumerge",
    "scope",
    "svd-prune",
    "visionzip",
    "vispruner",
]
"""Those that keep any number of image tokens at once: what `Energy` and `Chain` are made of."""


def energy(rng: Generator) -> dict:
    selector = some_reducer(rng.choice(SELECTORS), rng)
    tau = rng.choice([1e-6, 0.5, 0.9, 0.99, 1 - 1e-7])
    return {"selector": selector, "tau": tau, "least": some_keep(rng), "most": some_keep(rng)}


def chain(rng: Generator) -> dict:
    """A selector before the first layer, and one or two reducers that act after later layers."""
    before = [name for name in SELECTORS if name not in ("dart", "fastv")] + ["energy", "random"]
    after = ["pyramiddrop", "sparsevlm", "fastv", "dart", "v2drop", "vtw", "random", "uniform"]
    while True:
        names = [rng.choice(before), *rng.sample(after, rng.randint(1, 2))]
        reducers = tuple(some_reducer(name, rng) for name in names)
        layers = [layer for reducer in reducers for layer in reducer.layers]
        alike = {reducer.traits.post_layer for reducer in reducers if max(reducer.layers) >= 0}
        if len(set(layers)) == len(layers) and len(alike) == 1:
            return {"reducers": reducers}


def compose(rng: Generator) -> dict:
    tower = some_reducer(rng.choice(["tome", "dymu", "uniform", "pool", "random"]), rng)
    inside = rng.choice(["pumer", "tome", "random", "divprune", "pyramiddrop", "energy"])
    return {"tower": tower, "inside": some_reducer(inside, rng)}


SETTINGS: dict[str, Callable[[Generator], dict]] = {
    "cdpruner": lambda rng: {
        "keep": some_keep(rng),
        "theta": rng.choice([None, rng.uniform(0.01, 0.99)]),
        "inverted": rng.random() < 0.3,
    },
    "chain": chain,
    "compose": compose,
    "dart": lambda rng: {
        "keep": some_keep(rng),
        "pivots": rng.choice([(4, 4), (0, 5), (3, 0), (rng.randint(1, 70), rng.randint(0, 50))]),
        "layer": rng.randint(EMBEDDINGS, DEPTH - 1),
    },
    "divprune": lambda rng: {"keep": some_keep(rng)},
    "dymu": lambda rng: {
        "thresholds": tuple(
            rng.choice([-1, 0.0, 0.99, 1.0, 2, rng.random()]) for _ in range(DEPTH)
        ),
        "cap": rng.choice([None, some_keep(rng)]),
    },
    "dynamicvit": lambda rng: {
        "keep": rng.choice([1.0, 1e-9, 1 - rng.random()]),
        "layers": some_layers(rng),
    },
    "energy": energy,
    "fastervlm": with_saliency,
    "fastv": lambda rng: {"keep": some_keep(rng), "layer": rng.randint(1, DEPTH)},
    "fopru": fopru,
    "hiprune": lambda rng: {
        "keep": some_keep(rng),
        "alpha": rng.choice([0, 1, 0.1, rng.random()]),
        "object_layer": 1,
        "penalty": rng.choice([None, None, 1.0, rng.random()]),
    },
    "holov": holov,
    "mmtok": lambda rng: {
        "keep": some_keep(rng),
        "alpha": rng.choice([0.0, 0.5, rng.uniform(0, 3)]),
        "text_temperature": rng.choice([0.01, 0.02, rng.uniform(0.01, 2)]),
        "image_temperature": rng.choice([0.2, rng.uniform(0.05, 2)]),
    },
    "no-vision": lambda rng: {},
    "none": lambda rng: {},
    "pool": lambda rng: {"window": rng.randint(1, 5), "layer": rng.randint(EMBEDDINGS, DEPTH - 1)},
    "prumerge": lambda rng: {
        "keep": rng.choice([None, some_keep(rng)]),
        "plus": rng.random() < 0.5,
        "saliency": rng.choice(SALIENCY),
        "neighbours": rng.choice([0, 1, 32, rng.randint(0, 70)]),
    },
    "pumer": pumer_beyond_the_paper,
    "pyramiddrop": lambda rng: stages(rng, falling=True),
    "random": lambda rng: {
        "prune": some_ratio(rng),
        "layers": some_layers(rng, EMBEDDINGS),
        "seed": rng.randint(0, 9),
    },
    "scope": lambda rng: {
        "keep": some_keep(rng),
        "saliency": rng.choice(SALIENCY),
        "alpha": rng.choice([0.0, 1.0, rng.uniform(0, 3)]),
        "combine": rng.choice(["multiply", "add"]),
    },
    "smarttrim": lambda rng: {
        "layers": some_layers(rng),
        "text": rng.random() < 0.7,
        "heads": rng.random() < 0.5,
    },
    "sparsevlm": lambda rng: (
        stages(rng)
        | {"recycle": rng.random() < 0.7, "merge": rng.choice(["mean", "sum", "rating"])}
    ),
    "svd-prune": svd_prune,
    "tome": tome,
    "uniform": lambda rng: {"prune": some_ratio(rng), "layers": some_layers(rng, EMBEDDINGS)},
    "v2drop": v2drop,
    "visionzip": lambda rng: (
        with_saliency(rng) | {"contextual": rng.choice([0, 1, 9, 1.0, 0.15625, rng.random()])}
    ),
    "vispruner": lambda rng: (
        with_saliency(rng) | {"important": rng.choice([0, 1, 0.5, rng.random()])}
    ),
    "vtw": lambda rng: {"layer": rng.randint(1, DEPTH)},
}


OFFICIAL: dict[str, Callable[[Generator], dict]] = {
    "dynamicvit-official": lambda rng: SETTINGS["dynamicvit"](rng) | {"official": True},
    "pumer-official": lambda rng: (
        pumer(rng)
        | {"official": rng.choice([True, "meter"]), "style": rng.choice(["tome", "tip", "diff"])}
    ),
}
"""The published code's modes, which keep none of the rules on padding."""


def some_reducer(name: str, rng: Generator) -> Reducer:
    """A reducer of that name, one of `SETTINGS` or `OFFICIAL`, in random valid settings."""
    return get(name.removesuffix("-official"))(**(SETTINGS | OFFICIAL)[name](rng))


def members(reducer: Reducer) -> list[Reducer]:
    """The reducer and those that it is made of."""
    parts = [getattr(reducer, name, None) for name in ("selector", "inside", "tower")]
    parts = [part for part in parts if part is not None] + list(getattr(reducer, "reducers", ()))
    return [reducer, *(member for part in parts for member in members(part))]
