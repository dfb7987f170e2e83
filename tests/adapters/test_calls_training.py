"""Recomputation for gradients sees what its own forward saw, whatever was called in between."""

import calls
import pytest
import torch
from calls import PLACES

import pumer

FAMILIES = ("ViLT", "METER", "llava", "qwen2_vl", "gemma3")


def checkpointed(model, reentrant):
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    if reentrant and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model


def loss(model, batch):
    """A number that depends on every logit, the model's own loss where it writes text."""
    if "use_cache" in batch:
        return model(**batch, labels=batch["input_ids"]).loss
    logits = model(**batch).logits
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def trained_batch(family, seed=3, rows=2):
    batch = calls.inputs(family, seed=seed, rows=rows)
    return batch if family in ("ViLT", "METER") else batch | {"use_cache": False}


def gradients(model, family, between=None):
    model.train()
    model.zero_grad()
    value = loss(model, trained_batch(family))
    if between is not None:
        between(model)
    value.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), grads


def check_same_gradients(family, place, reentrant, between=None):
    plain = pumer.apply(calls.model(family), PLACES[place])
    value, expected = gradients(plain, family)
    model = checkpointed(pumer.apply(calls.model(family), PLACES[place]), reentrant)
    said, grads = gradients(model, family, between)
    calls.near(said, value)
    assert sum(grad.abs().sum() > 0 for grad in expected.values()) > 10
    for name, grad in expected.items():
        if grad.abs().sum() == 0 and name not in grads:
            continue
        scale = grad.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(
            grads[name] / scale, grad / scale, rtol=1e-3, atol=1e-3, msg=name
        )


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family, place, reentrant):
    check_same_gradients(family, place, reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_between_forward_and_backward(family, place, reentrant):
    """As a metric, a second loss or another rank's sample is computed."""

    def between(model):
        with torch.no_grad():
            model(**trained_batch(family, seed=8, rows=1))

    check_same_gradients(family, place, reentrant, between)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reducer_is_gone_before_the_backward(family, place):
    """`reduced` around the forward alone."""
    plain = pumer.apply(calls.model(family), PLACES[place])
    _, expected = gradients(plain, family)
    model = pumer.apply(calls.model(family), PLACES[place])
    _, grads = gradients(model, family, pumer.remove)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["ViLT", "llava"])
def test_two_losses_of_one_model(family, place):
    """Both forwards first, then both backwards, the first one last."""
    model = checkpointed(pumer.apply(calls.model(family), PLACES[place]), False).train()
    batches = [trained_batch(family, seed=seed, rows=1 + seed) for seed in range(2)]

    def total(values):
        model.zero_grad()
        for value in values:
            value().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    one_by_one = total([lambda batch=batch: loss(model, batch) for batch in batches])
    losses = [loss(model, batch) for batch in batches]
    together = total([lambda value=value: value for value in reversed(losses)])
    for name, grad in one_by_one.items():
        torch.testing.assert_close(together[name], grad, rtol=1e-3, atol=1e-3, msg=name)
