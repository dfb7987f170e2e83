"""Dropping tokens after a layer is masking them from the next one on, in every family and kind of
batch."""

import oracle_llm
import pytest
import tiny_llm
import torch

import halves
import pumer
from pumer import VTW, Chain, MMTok, NoVision, PuMer, Random, Uniform, V2Drop
from pumer.reducers import FastV

LAYOUTS = {
    "single": ((4, "i", 6),),
    "two images": ((3, "i", 2, "i", 5),),
    "padded": ((4, "i", 6), (2, "i", "i", 3), (2, "i", 3, "i", 2), (5,)),
}
PRUNING = {
    "inside": Uniform(prune=0.4, layers=(0, 2)),
    "both": Random(prune=0.3, layers=(-1, 1)),
    "no-vision": NoVision(),
    "pumer": PuMer(prune=0.4, merge=0, merge_text=0, layers=(0, 1)),
    "smooth": PuMer(prune=(0.2, 0.3), merge=0, merge_text=0, layers=(0, 1), smooth=0.7),
    "fastv": FastV(keep=3, layer=1),
    "three places": Chain((MMTok(keep=0.6), V2Drop(keep=(0.5,), layers=(0,)), VTW(layer=2))),
}
SETTINGS = {
    "max_new_tokens": 16,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module", params=tiny_llm.BUILDERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("reducer", PRUNING)
def test_logits_of_batches_padded_on_the_right(model, family, reducer):
    inputs = tiny_llm.batch(family, LAYOUTS["padded"], "right")
    with pumer.reduced(model, PRUNING[reducer]):
        marks = oracle_llm.kept(model, inputs)
        reduced = logits(model, inputs)
    with oracle_llm.masked(model, marks):
        expected = logits(model, inputs)
    real = inputs["attention_mask"].bool() & marks[max(marks)]
    torch.testing.assert_close(reduced[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", halves.sweep(LAYOUTS, ("padded",)))
@pytest.mark.parametrize("reducer", PRUNING)
def test_generate(model, family, reducer, layout):
    inputs = tiny_llm.batch(family, LAYOUTS[layout])
    with pumer.reduced(model, PRUNING[reducer]):
        marks = oracle_llm.kept(model, inputs)
        reduced = model.generate(**inputs, **SETTINGS)
    with oracle_llm.masked(model, marks):
        expected = model.generate(**inputs, **SETTINGS)
    assert reduced.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if reducer != "fastv" or family in (
        "llava",
        "paligemma",
    ):  # what one drops of four may matter to nobody
        stock = logits(model, inputs)[:, -1]
        assert not torch.allclose(reduced.logits[0], stock, atol=1e-2), (
            "the tokens dropped make no difference"
        )
