"""Reducers that a language model's attention guides, against outputs of their published code.

Departures that the docstrings of the reducers state, and what is compared in spite of them:

* PyramidDrop asks the layer it acts after: it is given the rotated query and keys of the sheet.
* SparseVLM keeps clusters at their centre's place, and what the published code makes a cluster of
  one token is a kept token here: groups of tokens are compared, not their order.
* DART adds no pivots to the budget: it is given the number that the published code keeps. It goes
  through the pivots in an order of its own: the sets are equal once the order is that of the
  published code, and where our own order keeps other tokens, that is in `OTHER_ORDER`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from selector_parity import Case
from torch import Tensor

from pumer.reducers import DART, FastV, Plan, PyramidDrop, SparseVLM, Tokens, V2Drop
from pumer.reducers.dart import take_unlike
from pumer.reducers.ops.saliency import last_text_attention, text_saliency
from pumer.reducers.sparsevlm import raters
from pumer.reducers.tokens import Embeddings

LAYER = 5
OTHER_ORDER = {
    "n144_36": 2,
    "n64_16": 1,
    "odd": 2,
    "two_pivots": 0,
    "by_ratio": 1,
    "no_words_before": 6,
    "text_pivots_only": 1,
}
"""Cases of DART, and how many tokens differ because our order of the pivots is another one."""


def in_places(case: Case, rotate: int = 0) -> Tokens:
    """The prompt of a case, text first: words before the image, image, words after it."""
    before, image = case.settings["words_before"], case.settings["image_tokens"]
    after = case.settings["words_after"]
    length = before + image + after
    places = torch.arange(length)
    order = torch.cat([places[:before], places[before + image :], places[before : before + image]])

    def at(name: str) -> Tensor | None:
        x = case.inputs.get(name, case.outputs.get(name))
        return None if x is None else x[..., order, :][None]

    embeddings, text = at("embeddings"), before + after
    valid = torch.ones(1, length, dtype=torch.bool)
    return Tokens(
        mask_BN=valid,
        text=text,
        sizes_BN=torch.ones(1, length),
        layer=LAYER,
        num_prefix_tokens=0,
        states_BND=at("states"),
        queries_BHNC=at("queries"),
        keys_BHNC=at("keys"),
        place_BN=order[None],
        embeddings=None
        if embeddings is None
        else Embeddings(embeddings[:, :text], embeddings[:, text:], valid[:, text:]),
    )


def kept(plan: Plan, tokens: Tokens) -> list[int]:
    """Image tokens that a plan keeps."""
    return (plan.slot_BN[0, tokens.text :] >= 0).nonzero().flatten().tolist()


def close(ours: Tensor, published: Tensor) -> None:
    """Equal to 1e-5 relative to the largest value."""
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-5 * float(published.abs().max()))


def fastv(case: Case) -> None:
    tokens = in_places(case)
    plan = FastV(keep=case.settings["keep"], layer=LAYER + 1).plan(tokens)
    if case.raises:
        # A budget above the image: here all tokens stay.
        assert len(kept(plan, tokens)) == case.settings["image_tokens"]
        return
    close(last_text_attention(tokens)[0], case.outputs["scores"])
    assert kept(plan, tokens) == case.outputs["keep"].tolist()


def pyramiddrop(case: Case) -> None:
    tokens = in_places(case)
    last = torch.zeros_like(tokens.keys_BHNC)
    last[:, :, tokens.text - 1] = case.outputs["queries_last"]
    stage, shares = case.settings["stage"], tuple(case.settings["ratios"][1:])
    reducer = PyramidDrop(keep=shares, layers=tuple(LAYER - stage + i for i in range(len(shares))))
    plan = reducer.plan(replace(tokens, queries_BHNC=last))
    assert kept(plan, tokens) == case.outputs["keep"].tolist()


def sparsevlm(case: Case) -> None:
    tokens, out = in_places(case), case.outputs
    before = case.settings["words_before"]
    words = raters(tokens)[0].nonzero().flatten() - before
    assert words.tolist() == out["counts_rater_words"].tolist()
    rated = text_saliency(tokens, rows_BT=raters(tokens))[0] / len(words)
    close(rated, out["scores"])

    groups = {frozenset([token]): None for token in out["keep"].tolist()}
    for row, features in enumerate(out["features"]):
        members = out["weights_source"][out["weights_row"] == row].tolist()
        groups[frozenset(members)] = features
    plan = SparseVLM(keep=(case.settings["keep"],), layers=(LAYER,)).plan(tokens)
    slots = plan.slot_BN[0, tokens.text :] - tokens.text
    reduced = plan.reduce(tokens.states_BND)[0, tokens.text :]
    sources = [(slots == slot).nonzero().flatten().tolist() for slot in range(len(reduced))]
    ours = dict(zip(map(frozenset, sources), reduced, strict=True))
    assert ours.keys() == groups.keys()
    for members, features in groups.items():
        if features is not None:
            close(ours[members], features)


def dart(case: Case) -> None:
    tokens, published = in_places(case), case.outputs["keep"].tolist()
    pivots = case.settings["pivot_image"], case.settings["pivot_text"]
    reducer = DART(keep=len(published), pivots=pivots, layer=LAYER)
    ours = kept(reducer.plan(tokens), tokens)
    assert len(ours) == len(published)

    # The same choice with the published order: that of a Python set of the pivots' places.
    text, before = tokens.text, case.settings["words_before"]
    size = tokens.keys_BHNC[0].abs().sum((0, 2))
    image = size[text:].topk(pivots[0]).indices + text
    words = size[before:text].topk(pivots[1]).indices + before
    at_place = {int(tokens.place_BN[0, i]): int(i) for i in (*image, *words)}
    order = [at_place[place] for place in set(at_place)]
    unit = torch.nn.functional.normalize(tokens.states_BND[0], dim=-1)
    chosen = torch.zeros(1, len(size) - text, dtype=torch.bool)
    chosen[0, image - text] = True
    quota = torch.full((1, len(order)), (len(published) - pivots[0]) // len(order))
    similarity = (unit[order] @ unit[text:].T)[None]
    in_order = take_unlike(similarity, quota, chosen, torch.ones_like(chosen))
    assert in_order[0].nonzero().flatten().tolist() == published
    assert len(set(ours) - set(published)) == OTHER_ORDER[case.name]


def v2drop(case: Case) -> None:
    """Stage after stage, each on the tokens that the one before has left."""
    stages, before = case.settings["layers"], case.settings["words_before"]
    layers = tuple(stage - 1 for stage in stages)
    reducer = V2Drop(keep=tuple(map(float, case.settings["keep_ratios"])), layers=layers)
    left = torch.arange(case.settings["image_tokens"])
    for stage, layer in zip(stages, layers, strict=True):
        mask_BN = torch.ones(1, len(left), dtype=torch.bool)
        tokens = Tokens(
            mask_BN=mask_BN,
            text=0,
            sizes_BN=mask_BN.float(),
            layer=layer,
            num_prefix_tokens=0,
            states_BND=case.inputs[f"cur{stage}"][None, before + left],
            input_BND=case.inputs[f"prev{stage}"][None, before + left],
        )
        left = left[kept(reducer.plan(tokens), tokens)]
        assert left.tolist() == case.outputs[f"keep{stage}"].tolist()


RUNNERS = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "dart": dart,
    "v2drop": v2drop,
}
