"""What others put around a model after `apply` survives `remove` and a second `apply`, or an error
says so."""

import copy
import functools
import inspect
import threading

import calls
import pytest
import tiny
import tiny_llm
import torch
from accelerate import Accelerator
from calls import PLACES, answer, generated, near

import pumer

FAMILIES = ("llava", "qwen2_vl", "ViLT", "METER")
# PEFT asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IN_THE_WAY = r"forward"
"""What an error has to name."""


def inner(model, family):
    """A module inside the model whose forward others wrap too."""
    if family == "ViLT":
        return model.vilt
    if family == "METER":
        return model.meter.layers[0]
    return model.model


def wrap(module, calls_seen):
    """A wrapper around an instance's forward, as autocast, tracing and offload hooks put it."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        calls_seen.append(1)
        return forward(*args, **kwargs)

    module.forward = wrapped
    return wrapped


# --- forward ---


@pytest.mark.parametrize("part", ["model", "inside"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_survives_a_second_apply_and_remove(family, part):
    model, batch, seen = calls.model(family), calls.inputs(family, rows=2), []
    stock = answer(model, batch)
    pumer.apply(model, PLACES["before"])
    before = answer(model, batch)
    wrapped = wrap(model if part == "model" else inner(model, family), seen)
    near(answer(model, batch), before)
    assert len(seen) == 1
    try:
        pumer.apply(model, PLACES["inside"])
    except (ValueError, RuntimeError) as error:
        calls.must_say(error, IN_THE_WAY)
        near(answer(model, batch), before)  # all is as it was
        with pytest.raises((ValueError, RuntimeError), match=IN_THE_WAY):
            pumer.remove(model)
        near(answer(model, batch), before)
        assert len(seen) == 3
        return
    expected = answer(pumer.apply(calls.model(family), PLACES["inside"]), batch)
    near(answer(model, batch), expected)
    assert len(seen) == 2
    pumer.remove(model)
    near(answer(model, batch), stock)
    assert len(seen) == 3
    module = model if part == "model" else inner(model, family)
    assert module.forward is wrapped


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_that_was_there_before_survives(family):
    model, batch, seen = calls.model(family), calls.inputs(family, rows=2), []
    stock = answer(model, batch)
    wrapped = wrap(model, seen)
    pumer.apply(model, PLACES["before"])
    answer(model, batch)
    pumer.apply(model, PLACES["inside"])
    answer(model, batch)
    pumer.remove(model)
    near(answer(model, batch), stock)
    assert len(seen) == 3
    assert model.forward is wrapped


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_others_stay(family):
    model, batch, seen = calls.model(family), calls.inputs(family), []
    pumer.apply(model, PLACES["before"])
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (model, inner(model, family))
    ]
    answer(model, batch)
    pumer.apply(model, PLACES["inside"])
    answer(model, batch)
    pumer.remove(model)
    answer(model, batch)
    assert len(seen) == 6
    for handle in handles:
        handle.remove()
    answer(model, batch)
    assert len(seen) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_instance_methods_are_bound_methods(family):
    """As torch.export, dynamo, inspect and accelerate want them."""
    model = calls.model(family)
    pumer.apply(model, PLACES["inside"])
    for module in model.modules():
        for name, value in vars(module).items():
            on_class = getattr(type(module), name, None)
            if callable(value) and callable(on_class):
                assert inspect.ismethod(value) or inspect.isfunction(value), name
    stock = inspect.signature(type(model).forward).parameters
    reduced = inspect.signature(model.forward).parameters
    assert set(stock) - {"self"} <= set(reduced) or "kwargs" in reduced


@pytest.mark.slow
def test_compiled_forward_survives():
    model, batch = calls.model("llava"), calls.inputs("llava")
    pumer.apply(model, PLACES["before"])
    expected = answer(model, batch)
    compiled = torch.compile(model.forward, backend="eager")
    model.forward = compiled
    near(answer(model, batch), expected)
    try:
        pumer.apply(model, PLACES["inside"])
        pumer.remove(model)
    except (ValueError, RuntimeError) as error:
        calls.must_say(error, IN_THE_WAY)
        assert model.forward is compiled
        near(answer(model, batch), expected)
    else:
        assert model.forward is compiled
        near(answer(model, batch), answer(calls.model("llava"), batch))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ViLT", "llava"])
def test_compiled_modules_around_a_reduced_model(family):
    """`torch.compile(model)` is a wrapper that holds the model: its reducer comes off inside it."""
    model, batch = calls.model(family), calls.inputs(family)
    stock = answer(model, batch)
    pumer.apply(model, PLACES["before"])
    compiled = torch.compile(model, backend="eager")
    near(answer(compiled, batch), answer(model, batch))
    pumer.remove(model)
    near(answer(compiled, batch), stock)
    near(answer(model, batch), stock)


# --- accelerate ---


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_unwrap_model_without_the_wrapper_of_mixed_precision(family, place):
    batch = calls.inputs(family, rows=2)
    model = calls.model(family)
    stock = answer(model, batch)
    expected = answer(pumer.apply(model, PLACES[place]), batch)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert answer(prepared, batch).shape == expected.shape
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    near(answer(plain, batch), expected)  # in float32 again
    pumer.remove(plain)
    near(answer(plain, batch), stock)


def test_mixed_precision_put_on_after_apply_survives():
    batch = calls.inputs("llava")
    model = pumer.apply(calls.model("llava"), PLACES["before"])
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    with torch.no_grad():
        half = model(**batch).logits
    assert not torch.equal(half, answer(pumer.apply(calls.model("llava"), PLACES["before"]), batch))
    try:
        pumer.apply(model, PLACES["inside"])
    except (ValueError, RuntimeError) as error:
        calls.must_say(error, IN_THE_WAY)
        near(answer(model, batch), half[:, -1])
        return
    fresh = pumer.apply(calls.model("llava"), PLACES["inside"])
    fresh = Accelerator(mixed_precision="bf16", cpu=True).prepare(fresh)
    near(answer(model, batch), answer(fresh, batch))  # still in half precision


# --- PEFT ---


def with_lora(model, family):
    targets = {"llava": ["q_proj", "v_proj"], "qwen2_vl": ["q_proj", "v_proj"]}
    peft = pytest.importorskip("peft", reason="needs the package peft")
    config = peft.LoraConfig(r=2, target_modules=targets.get(family, ["query", "value"]))
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return wrapped.eval()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_put_on_after_apply(family, place):
    batch = calls.inputs(family, rows=2)
    stock = answer(with_lora(calls.model(family), family), batch)
    expected = answer(
        pumer.apply(with_lora(calls.model(family), family).base_model.model, PLACES[place]), batch
    )
    model = with_lora(pumer.apply(calls.model(family), PLACES[place]), family)
    near(answer(model, batch), expected)
    pumer.remove(model)
    assert pumer.active(model) is None
    near(answer(model, batch), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verbs_take_a_peft_model(family):
    """Each reaches the model inside, or says that it is to be given."""
    batch = calls.inputs(family, rows=2)
    model = with_lora(calls.model(family), family)
    stock = answer(model, batch)
    try:
        pumer.apply(model, PLACES["inside"])
    except ValueError as error:
        calls.must_say(error, "pass that module instead")
        pumer.apply(model.base_model.model, PLACES["inside"])
    reduced = answer(model, batch)
    assert not torch.allclose(reduced, stock, atol=1e-3)
    assert pumer.active(model) is not None
    assert pumer.report(model).active
    if family in tiny_llm.BUILDERS:
        assert len(generated(model, batch)[0]) == calls.GREEDY["max_new_tokens"]
    pumer.remove(model)
    assert pumer.active(model) is None
    assert pumer.active(model.base_model.model) is None
    near(answer(model, batch), stock)


def test_merged_lora_of_a_reduced_model():
    batch = calls.inputs("llava", rows=2)
    model = with_lora(pumer.apply(calls.model("llava"), PLACES["inside"]), "llava")
    expected = answer(model, batch)
    merged = model.merge_and_unload()
    near(answer(merged, batch), expected, 1e-3)
    pumer.remove(merged)
    assert pumer.active(merged) is None
    assert not torch.allclose(answer(merged, batch), expected, atol=1e-3)


# --- copies ---


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_a_life_of_its_own(family, place):
    batch = calls.inputs(family, rows=2)
    model = calls.model(family)
    stock = answer(model, batch)
    expected = answer(pumer.apply(model, PLACES[place]), batch)
    twin = copy.deepcopy(model)
    pumer.remove(model)
    near(answer(twin, batch), expected)
    near(answer(model, batch), stock)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    other = pumer.apply(copy.deepcopy(pumer.remove(copy.deepcopy(twin))), PLACES[place])
    near(answer(twin, batch), answer(other, batch))  # its own weights
    near(answer(model, batch), stock)
    pumer.remove(twin)
    assert not torch.allclose(answer(twin, batch), expected, atol=1e-3)


REPLICATED = (*tiny.FAMILIES, "llava", "llava_next", "llava_onevision", "paligemma", "gemma3")
"""Replicas of the others ask for their own dtype, which transformers reads from parameters that
replicas lack."""


def replica(model):
    """As `torch.nn.parallel.replicate` makes one for another device: shallow copies of all modules,
    other tensors."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        twin = copies[module]
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:  # plain tensors, as replicas have them
                setattr(twin, name, parameter.detach().clone() * 1.05)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(twin, name, buffer.clone())
    return copies[model]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", REPLICATED)
def test_replicas_run_with_their_own_parameters(family, place):
    batch = calls.inputs(family, rows=2)
    model = pumer.apply(calls.model(family), PLACES[place])
    expected = answer(model, batch)
    scaled = calls.model(family)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.05)
    other = answer(pumer.apply(scaled, PLACES[place]), batch)
    twin = replica(model)
    near(answer(twin, batch), other)
    near(answer(model, batch), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["ViLT", "METER", "llava"])
def test_replicas_at_once(family, place):
    """As DataParallel runs them: a thread each."""
    batches = [calls.inputs(family, seed=seed, rows=2) for seed in range(2)]
    model = pumer.apply(calls.model(family), PLACES[place])
    answer(
        model, batches[0]
    )  # transformers puts hooks on in a first call, which must not be a replica's
    twins = [replica(model) for _ in batches]
    alone = [answer(twin, batch) for twin, batch in zip(twins, batches, strict=True)]
    said = {}

    def work(number):
        said[number] = [answer(twins[number], batches[number]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        for logits in said[number]:
            near(logits, alone[number])
