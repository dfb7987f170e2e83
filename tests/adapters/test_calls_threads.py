"""Several calls of one reduced model at once, or one inside another: each is answered as if
alone."""

import threading

import calls
import pytest
import tiny
import tiny_llm
import torch
from calls import PLACES, answer, generated, near

import pumer

FAMILIES = (*tiny.FAMILIES, *tiny_llm.BUILDERS)
USERS = 4


def users(family):
    """Prompts of different lengths and batches of different sizes."""
    return [calls.inputs(family, seed=number, rows=1 + number % 2) for number in range(USERS)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["ViLT", "llava"])
def test_four_threads(family, place):
    model = pumer.apply(calls.model(family), PLACES[place])
    counts = calls.in_threads(model, users(family), 25)
    assert counts == {"right": USERS * 25}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_threads_on_every_family(family, place):
    """Two hundred calls where the machinery differs, fifty in families that share it."""
    model = pumer.apply(calls.model(family), PLACES[place])
    rounds = 200 if family in ("ViLT", "METER", "llava", "qwen2_vl") else 50
    counts = calls.in_threads(model, users(family), rounds)
    assert counts == {"right": USERS * rounds}


@pytest.mark.parametrize("place", PLACES)
def test_threads_that_generate(place):
    model = pumer.apply(calls.model("llava"), PLACES[place])
    same = lambda a, b: a == b  # noqa: E731
    counts = calls.in_threads(model, users("llava"), 5, generated, same)
    assert counts == {"right": USERS * 5}


def test_a_turn_of_another_thread_between_prefill_and_decoding():
    """The cache, not the model, says what a conversation has left."""
    model = pumer.apply(calls.model("llava"), PLACES["inside"])
    first, second = calls.inputs("llava", seed=0), calls.inputs("llava", seed=1)
    more = torch.tensor([[7, 8]])

    def turns(between=None):
        with torch.no_grad():
            cache = calls.cache_of(model(**first))
            if between is not None:
                other = threading.Thread(target=answer, args=(model, between))
                other.start()
                other.join()
            return model(input_ids=more, **calls.cached(model, cache)).logits

    near(turns(second), turns())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["ViLT", "METER", "llava", "qwen3_vl"])
def test_a_call_inside_a_call(family, place):
    """A hook on a layer asks the same model something else, as a verifier or a logger may."""
    model = pumer.apply(calls.model(family), PLACES[place])
    outer, inner = calls.inputs(family, seed=0), calls.inputs(family, seed=1, rows=2)
    expected, expected_inner = answer(model, outer), answer(model, inner)
    lengths = []
    inside, answers = [], []

    def ask(module, args, kwargs=None):
        if not inside:
            inside.append(True)
            answers.append(answer(model, inner))
            inside.clear()

    trunk = tiny_layers(model, family)
    handles = [layer.register_forward_pre_hook(ask) for layer in trunk]
    near(answer(model, outer), expected)
    lengths = pumer.active(model).lengths
    for handle in handles:
        handle.remove()
    assert len(answers) == len(trunk)
    for said in answers:
        near(said, expected_inner)
    answer(model, outer)
    assert lengths == pumer.active(model).lengths


def tiny_layers(model, family):
    """The layers that a reducer acts in."""
    if family == "ViLT":
        return list(model.vilt.encoder.layer)
    if family == "BridgeTower":
        return list(model.bridgetower.cross_modal_text_layers)
    if family == "METER":
        return list(model.meter.layers)
    trunk = model.model
    return list(
        (trunk.language_model if hasattr(trunk, "language_model") else trunk.text_model).layers
    )


def test_two_models_of_different_reducers_at_once():
    batch = calls.inputs("llava", rows=2)
    models = [pumer.apply(calls.model("llava"), reducer) for reducer in PLACES.values()]
    expected = [answer(model, batch) for model in models]
    wrong = []

    def work(model, right):
        for _ in range(20):
            if not torch.allclose(answer(model, batch), right, atol=1e-4):
                wrong.append(pumer.active(model).reducer.name)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
