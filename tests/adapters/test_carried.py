"""What a plan carries on of its tokens is what the next layer that reduces is given."""

import calls
import pytest
import tiny
import tiny_llm
import torch

import pumer
from pumer import Chain, PuMer
from pumer.reducers import Uniform

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))


def carrying_sizes(seen, **settings):
    """PuMer, which carries on how many tokens each stands for: the next layer is to get the sizes
    that it has anyway, whatever was merged, dropped, padded or moved."""

    class Carrying(PuMer):
        def plan(self, tokens):
            if tokens.carried_BN is not None:
                real_BN = tokens.valid_BN
                torch.testing.assert_close(tokens.carried_BN[real_BN], tokens.sizes_BN[real_BN])
            seen.append(tokens.carried_BN is not None)
            plan = super().plan(tokens)
            object.__setattr__(plan, "carried_BN", tokens.sizes_BN)
            return plan

    return Carrying(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 1, 2), **settings)


@pytest.mark.parametrize("settings", [{}, {"prune_below": 0.9}], ids=["same", "by sample"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_encoder_carries_on_what_it_is_asked_to(family, pack, settings):
    if pack and family == "BridgeTower":
        pytest.skip("it does not pack")
    kind, seen = tiny.FAMILIES[family], []
    model = pumer.apply(tiny.model(kind), carrying_sizes(seen, **settings), pack=pack)
    tiny.logits(model, tiny.batch(kind))
    assert seen == [False, True, True]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_a_decoder_carries_on_what_it_is_asked_to(family):
    seen = []
    model = pumer.apply(tiny_llm.model(family), carrying_sizes(seen))
    calls.answer(model, tiny_llm.batch(family, LAYOUT))
    assert seen == [False, True, True]


def test_what_other_reducers_leave_is_carried_on_through_them():
    kind, seen = tiny.FAMILIES["ViLT"], []
    carrying = carrying_sizes(seen)
    object.__setattr__(carrying, "layers", (0, 3))
    model = pumer.apply(tiny.model(kind), Chain((carrying, Uniform(prune=0.3, layers=(1,)))))
    tiny.logits(model, tiny.batch(kind))
    assert seen == [False, True]
