"""Training a reduced model: gradients flow through what is kept, and are the same when layers are
computed twice."""

import matrix
import pytest
import tiny
import torch

import pumer


def gradients(model, inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


CHECKPOINTED = {
    "ViltForQuestionAnswering": ["vilt.encoder.layer.1.intermediate.dense"],
    "MeterForQuestionAnswering": [
        "meter.layers.1.text.intermediate.dense",
        "meter.vision_model.encoder.layers.1.mlp.fc1",
        "meter.text_model.encoder.layer.1.intermediate.dense",
    ],
}
"""A module of every kind of layer."""
FIRST_QUERY = {
    "ViltForQuestionAnswering": "vilt.encoder.layer.0.attention.attention.query.weight",
    "MeterForQuestionAnswering": "meter.layers.0.text.attention.self.query.weight",
    "BridgeTowerForQuestionAnswering": (
        "bridgetower.cross_modal_text_layers.0.attention.self.query.weight"
    ),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("kind", "reducer"),
    [
        case
        for case in matrix.on_every_family(official=matrix.OFFICIAL)
        if case.id.split("-", 1)[1] in ("pumer", "tome", "tome+pumer", "official")
        and case.values[0] in CHECKPOINTED  # which stock BridgeTower does not support
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(kind, reducer, reentrant):
    model, inputs = tiny.model(kind).train(), tiny.batch(kind)
    pumer.apply(model, reducer)
    expected = gradients(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = []
    for name in CHECKPOINTED[kind]:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: again.append(name))
    found = gradients(model, inputs)
    assert sorted(again) == sorted(2 * CHECKPOINTED[kind]), (
        "not computed again on the way back: nothing was saved"
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "reducer"), matrix.on_every_family(official=matrix.OFFICIAL))
def test_training_with_dropout(kind, reducer):
    model = tiny.model(kind, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    inputs = tiny.batch(kind)
    pumer.apply(model, reducer)
    found = gradients(model, inputs)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    assert found[FIRST_QUERY[kind]].abs().sum() > 0
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
