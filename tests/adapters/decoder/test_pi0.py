"""PI0: actions from fewer tokens of the cameras' images."""

import warnings

import oracle_llm
import pytest
import tiny_pi0
import torch
from tiny_llm import near

import pumer
from pumer import FastV, FoPru, PuMer, Random, Uniform

LAYOUT = ((2, 4), (1, 6), (2, 3))
PRUNING = {
    "before": Random(prune=0.5),
    "both": Random(prune=0.4, layers=(-1, 1)),
    "fastv": FastV(keep=0.5, layer=1),
    "tower": FoPru(keep=0.5),
}
MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 1))


@pytest.fixture(scope="module")
def model():
    return tiny_pi0.model()


def velocity(model, inputs, **more):
    """One step of the expert, images and order read in the same call."""
    with torch.no_grad():
        step = torch.full((len(inputs["state"]),), 0.7)
        return model(**inputs, timestep=step, **more).logits


CALLS = {"chunk": lambda model, inputs: model.sample_actions(**inputs), "step": velocity}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_reducing_nothing_changes_nothing(model, call):
    inputs = tiny_pi0.batch(LAYOUT)
    stock = call(model, inputs)
    set_before = [sorted(vars(module)) for module in model.modules()]
    with pumer.reduced(model, Uniform(prune=0, layers=(-1, 1))):
        near(call(model, inputs), stock)
    assert torch.equal(call(model, inputs), stock)
    assert [sorted(vars(module)) for module in model.modules()] == set_before
    assert not any(layer._forward_pre_hooks for layer in model.model.dit.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reducer", PRUNING.values(), ids=PRUNING)
def test_dropping_is_masking(reducer, call, attention):
    """From PaliGemma's layers, and from those of the expert."""
    model, inputs = tiny_pi0.model(attention), tiny_pi0.batch(LAYOUT)
    stock = call(model, inputs)
    with pumer.reduced(model, reducer):
        marks, reduced = oracle_llm.kept(model, inputs), call(model, inputs)
        assert pumer.report(model).active
    hidden = oracle_llm.masked(model, marks, of=model.model.dit)
    with oracle_llm.masked(model, marks), hidden:
        near(reduced, call(model, inputs))
    assert (reduced - stock).abs().amax((1, 2)).min() > 1e-2
    is_image = inputs["input_ids"] == tiny_pi0.IMAGE
    gone = ~marks[max(marks)] & inputs["attention_mask"].bool()
    assert gone.any(1).all()
    assert not (gone & ~is_image).any()


@pytest.mark.parametrize("reducer", [MERGING, FoPru(keep=0.5), FastV(keep=0.5, layer=1)])
def test_a_row_of_a_batch_is_the_sample_alone(model, reducer):
    with pumer.reduced(model, reducer):
        together = model.sample_actions(**tiny_pi0.batch(LAYOUT))
        for row, counts in enumerate(LAYOUT):
            alone = tiny_pi0.batch((counts,), seed=3 + row)
            near(together[row : row + 1], model.sample_actions(**alone))


def test_several_images_are_several_rows(model):
    with pumer.reduced(model, PRUNING["before"]), pumer.trace(model) as steps:
        model.sample_actions(**tiny_pi0.batch(LAYOUT))
    samples = [sample for sample, _, _ in steps[0].prompt.images]
    assert samples == [0, 0, 1, 2, 2]
    assert len(steps) == 1  # the prompt is read once, however many steps the expert takes


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_positions_counted_anew(model, call):
    """In every layer, those of the expert as well."""
    inputs = tiny_pi0.batch(LAYOUT)
    with pumer.reduced(model, PRUNING["both"], renumber=True):
        marks, reduced = oracle_llm.kept(model, inputs), call(model, inputs)
    anew = {"marks": marks, "renumber": True}
    with oracle_llm.masked(model, **anew), oracle_llm.masked(model, **anew, of=model.model.dit):
        near(reduced, call(model, inputs))


def test_training_reaches_the_tower(model):
    inputs = tiny_pi0.batch(LAYOUT)
    with pumer.reduced(model, PRUNING["both"]):
        model(**inputs, actions=torch.zeros(3, tiny_pi0.CHUNK, tiny_pi0.WIDTH)).loss.backward()
    tower = model.model.vlm.vision_tower
    assert any(weight.grad is not None and weight.grad.any() for weight in tower.parameters())
    model.zero_grad()


def test_prompts_that_are_merged_already_are_said_to_be_unreduced(model):
    inputs = tiny_pi0.batch(LAYOUT)
    pixels = inputs["pixel_values"], inputs["pixel_attention_mask"]
    with torch.no_grad():
        merged = model.model.embed_prefix(inputs["input_ids"], *pixels)
    stock = velocity(model, inputs)
    with pumer.reduced(model, PRUNING["both"]):
        without_ids = {name: x for name, x in inputs.items() if name != "input_ids"}
        with pytest.warns(UserWarning, match="nothing was reduced"):
            unreduced = velocity(model, without_ids, inputs_embeds=merged)
        near(unreduced, stock)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.sample_actions(**inputs)


def test_the_report_counts_the_expert(model):
    with pumer.reduced(model, PRUNING["both"]):
        report = pumer.report(model)
    assert 0 < report.parts["expert"] < report.base_parts["expert"]
    # Of what the expert costs, only the attention to the prompt depends on it.
    tokens, heads, channels = tiny_pi0.CHUNK + 1, 4, 8
    spared = sum(sum(report.entry) - sum(pair) for pair in report.lengths[:-1])
    attention = 3 * 2 * tokens * spared * heads * channels
    assert report.base_parts["expert"] - report.parts["expert"] == attention
    assert "expert" in str(report)
