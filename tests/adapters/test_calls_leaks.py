"""Nothing grows, nothing is held: after apply and remove, after a call and after one that
failed."""

import gc
import itertools
import threading
import tracemalloc
import warnings
import weakref

import calls
import pytest
import tiny
import tiny_llm
import torch
from calls import PLACES, answer, near
from torch import Tensor

import halves
import pumer

FAMILIES = ("ViLT", "METER", "llava", "qwen2_vl")
ALL = (*tiny.FAMILIES, *tiny_llm.BUILDERS)
ROUNDS = 10


class Stop(Exception):
    """Raised by a layer."""


def tensors_alive():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def growth(work, rounds):
    """Bytes and tensors that rounds of work leave behind, in each of four parts the least.

    A leak grows in all of them; caches of torch and of other tests' objects that are replaced do
    not.
    """
    tracemalloc.start()
    try:
        # What was there before is not traced, and takes some rounds to be replaced by what is.
        for _ in range(max(3, rounds // 4)):
            work()
        gc.collect()
        marks = [(tracemalloc.get_traced_memory()[0], tensors_alive())]
        for _ in range(4):
            for _ in range(max(1, rounds // 4)):
                work()
            gc.collect()
            marks.append((tracemalloc.get_traced_memory()[0], tensors_alive()))
    finally:
        tracemalloc.stop()
    grown = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    return min(size for size, _ in grown), min(count for _, count in grown)


def check_apply_and_remove(family, rounds):
    model, batch = calls.model(family), calls.inputs(family)
    stock = answer(model, batch)
    state = calls.instance_state(model)  # transformers puts hooks of its own on in the first call

    def work():
        for reducer in PLACES.values():
            pumer.apply(model, reducer)
        pumer.remove(model)

    grown, tensors = growth(work, rounds)
    assert tensors <= 0
    assert grown < 10_000  # in a quarter of the rounds: not forty bytes a round of a thousand
    assert calls.instance_state(model) == state
    near(answer(model, batch), stock, 1e-6)  # ViLT's own order of patches is random


@pytest.mark.parametrize("family", halves.sweep(ALL, FAMILIES))
def test_apply_and_remove(family):
    check_apply_and_remove(family, ROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_and_remove_a_thousand_times(family):
    check_apply_and_remove(family, 1000)


# --- calls that fail ---


def failing_parts(model, family):
    """Modules all along a forward."""
    if family == "ViLT":
        words, layers = model.vilt.embeddings.text_embeddings, model.vilt.encoder.layer
        return [
            words,
            layers[0].attention.attention.query,
            layers[2].output.dense,
            model.classifier,
        ]
    if family == "BridgeTower":
        trunk = model.bridgetower
        layers = [
            trunk.text_model.encoder.layer[1],
            trunk.cross_modal_text_layers[0].crossattention,
        ]
        blocks = trunk.vision_model.visual.transformer.resblocks
        return [
            *layers,
            blocks[1],
            trunk.cross_modal_image_layers[2].output.dense,
            model.classifier,
        ]
    if family == "METER":
        text, vision, layers = model.meter.text_model, model.meter.vision_model, model.meter.layers
        dense = [layers[0].text.intermediate.dense, layers[2].image.output.dense]
        return [text.encoder.layer[1], vision.encoder.layers[1], *dense, model.classifier]
    trunk = model.model
    layers = oracle_layers(model)
    tower = next(
        getattr(trunk, name)
        for name in ("vision_tower", "visual", "vision_model")
        if hasattr(trunk, name)
    )
    return [tower, layers[0], layers[1].self_attn, layers[2], layers[3].mlp, model.lm_head]


def oracle_layers(model):
    trunk = model.model
    return (trunk.language_model if hasattr(trunk, "language_model") else trunk.text_model).layers


def fail(model, part, batch, raises=Stop):
    def stop(*_):
        raise raises

    handle = part.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            model(**batch)
    except raises:
        return True
    finally:
        handle.remove()
    return False


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", halves.sweep(ALL, FAMILIES))
def test_after_a_failed_call_nothing_is_held_and_the_next_is_right(family, place):
    model = pumer.apply(calls.model(family), PLACES[place])
    first, second = calls.inputs(family, seed=0), calls.inputs(family, seed=1, rows=2)
    expected = answer(model, second)
    failed = 0
    for part in failing_parts(model, family):
        batch = calls.copied(first)
        held = [weakref.ref(tensor) for tensor in batch.values()]
        failed += fail(model, part, batch)
        del batch
        gc.collect()
        assert all(ref() is None for ref in held), type(part).__name__
        near(answer(model, second), expected)
    assert failed >= 4


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_holds_nothing_when_it_is_done(family, place):
    model = pumer.apply(calls.model(family), PLACES[place])
    batch = calls.inputs(family, rows=2)
    answer(model, batch)  # which leaves the places that it kept
    held = [weakref.ref(tensor) for tensor in batch.values()]
    before = tensors_alive()
    with torch.no_grad():
        states = model(**calls.copied(batch), output_hidden_states=True).hidden_states
    held += [weakref.ref(tensor) for tensor in states]
    del states, batch
    gc.collect()
    assert all(ref() is None for ref in held)
    assert tensors_alive() <= before


@pytest.mark.parametrize("family", tiny_llm.BUILDERS)
def test_generate_that_is_interrupted(family):
    model = pumer.apply(calls.model(family), PLACES["inside"])
    batch = calls.inputs(family, rows=2)
    expected = calls.generated(model, batch)

    def interrupt(ids, scores):
        if ids.shape[1] > batch["input_ids"].shape[1] + 2:
            raise KeyboardInterrupt
        return scores

    copy = calls.copied(batch)
    held = [weakref.ref(tensor) for tensor in copy.values()]
    with pytest.raises(KeyboardInterrupt):
        calls.generated(model, copy, logits_processor=[interrupt])
    del copy
    gc.collect()
    assert all(ref() is None for ref in held)
    assert calls.generated(model, batch) == expected


def bad_inputs(family, batch):
    """Calls that the stock model refuses too."""
    yield {k: v for k, v in batch.items() if k != "input_ids"}
    yield batch | {"pixel_values": batch["pixel_values"][..., :-3]}
    yield batch | {"input_ids": batch["input_ids"] + 10**6}
    yield batch | {"attention_mask": batch["attention_mask"][:, :-2]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input(family, place):
    model, batch = calls.model(family), calls.inputs(family, rows=2)
    stock = []
    for wrong in bad_inputs(family, batch):
        with torch.no_grad():
            try:
                model(**wrong)
            except Exception as error:  # whatever it is that it refuses
                stock.append(type(error))
            else:
                stock.append(None)
    assert sum(error is not None for error in stock) >= 3
    pumer.apply(model, PLACES[place])
    expected = answer(model, batch)
    for wrong, refused in zip(bad_inputs(family, batch), stock, strict=True):
        if refused is not None:
            with pytest.raises(Exception), torch.no_grad():  # noqa: B017, PT011 - stock's own, of any class
                model(**wrong)
        near(answer(model, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_failed_calls(family, place):
    """In the families whose machinery differs; the others share it, and hold nothing of one failed
    call (above)."""
    model = pumer.apply(calls.model(family), PLACES[place])
    batch = calls.inputs(family)
    parts = failing_parts(model, family)
    expected, state = answer(model, batch), calls.instance_state(model)
    threads = threading.active_count()

    def work():
        for part in parts:
            fail(model, part, batch)

    grown, tensors = growth(work, 200 // len(parts))
    assert tensors <= 0
    assert grown < 10_000
    assert calls.instance_state(model) == state
    assert threading.active_count() == threads
    near(answer(model, batch), expected)


# --- parts by themselves ---


def parts_alone(model, family, batch):
    """What parts of a decoder say when they are called by themselves, as retrieval and probing code
    does."""
    trunk = model.model
    language = trunk.language_model if hasattr(trunk, "language_model") else trunk.text_model
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    said = {}
    with torch.no_grad():
        said["language model"] = language(inputs_embeds=embeds).last_hidden_state
        if family == "llava":
            said["tower"] = trunk.vision_tower(batch["pixel_values"]).last_hidden_state
            said["features"] = model.get_image_features(batch["pixel_values"]).pooler_output
        if family == "qwen2_vl":
            grid = batch["image_grid_thw"]
            said["features"] = model.get_image_features(batch["pixel_values"], grid).pooler_output
        layer = language.layers[1].mlp
        said["mlp"] = layer(embeds)
    return {
        name: torch.cat([tensor.flatten(0, -2) for tensor in value])
        if not isinstance(value, Tensor)
        else value
        for name, value in said.items()
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_parts_of_a_reduced_model_by_themselves(family, place):
    """They see no prompt: they do what the stock ones do, between calls and after one that
    failed."""
    model, batch = calls.model(family), calls.inputs(family)
    stock = parts_alone(model, family, batch)
    pumer.apply(model, PLACES[place])
    expected = answer(model, batch)
    for name, tensor in parts_alone(model, family, batch).items():
        near(tensor, stock[name])
    for part in failing_parts(model, family):
        fail(model, part, batch)
        for name, tensor in parts_alone(model, family, batch).items():
            near(tensor, stock[name])
    near(answer(model, batch), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_of_a_reduced_encoder_after_a_failure(family, place):
    model, batch = calls.model(family), calls.inputs(family)

    def alone():
        with torch.no_grad():
            if family == "ViLT":
                return model.vilt.embeddings.text_embeddings(batch["input_ids"])
            if family == "BridgeTower":
                return model.bridgetower.vision_model(batch["pixel_values"])
            return model.meter.vision_model(batch["pixel_values"]).last_hidden_state

    stock = alone()
    pumer.apply(model, PLACES[place])
    for part in failing_parts(model, family):
        fail(model, part, batch)
        assert torch.equal(alone(), stock)
