"""Prompts that get shorter before the language model: its cache, positions, outputs and
gradients."""

import copy
import pickle

import oracle_llm
import pytest
import tiny_llm
import torch
import transformers
from tiny_llm import CACHE, CLIP, GREEDY, IMAGE, TEXT, answer, logits, near

import pumer
from pumer import DivPrune, FastV, NoVision
from pumer.adapters.decoder import kv_cache

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2))
REDUCER = DivPrune(keep=0.5)
MORE = torch.tensor([[7, 9, 11]])
FAMILIES = ["qwen3_5", "lfm2_vl", "nemotron_omni", "inkling2", "glm5_next", "mistral_large4"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


def prefilled(model, inputs):
    with torch.no_grad():
        return kv_cache.find(model(**inputs, use_cache=True))


def test_a_cache_counts_the_prompt_and_holds_what_is_left(model, family):
    inputs = tiny_llm.batch(family, LAYOUT[:1])
    with pumer.reduced(model, REDUCER):
        cache = prefilled(model, inputs)
        kept = int((pumer.kept(model) >= 0).sum())
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length > kept
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    assert {part.shape[2] for part in keys if part is not None} == {kept}
    with pytest.raises(ValueError, match="decode with the model and the reducer"):
        logits(model, {"input_ids": MORE}, **{CACHE: cache})


def test_a_cache_can_be_copied_and_stored(model, family):
    with pumer.reduced(model, REDUCER), torch.no_grad():
        cache = prefilled(model, tiny_llm.batch(family, LAYOUT[:1]))
        twins = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache
        said = [model(input_ids=MORE, **{CACHE: twin}).logits for twin in twins]
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[1], said[2])


def test_beams_share_a_cache(model, family):
    if family == "glm5_next":
        pytest.skip("its stock model gives other beams with a cache than without")
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, REDUCER):
        cached = answer(model, inputs, num_beams=3)
        assert cached == answer(model, inputs, num_beams=3, use_cache=False)


def test_a_second_image_in_a_later_turn(model, family):
    """Each image is reduced by itself, so that two turns are one prompt."""
    whole = tiny_llm.batch(family, ((2, "i", 3, "i", 2),))
    ids, second = whole["input_ids"], tiny_llm.alone(family, ((2, "i"), (3, "i", 2)), 1)
    first = tiny_llm.batch(family, ((2, "i"),))
    length = first["input_ids"].shape[1]
    assert torch.equal(first["input_ids"], ids[:, :length])
    second = second | {
        "input_ids": ids[:, length:],
        "attention_mask": whole["attention_mask"],
    }
    second |= {name: whole[name][:, length:] for name in ("mm_token_type_ids",) if name in whole}
    with pumer.reduced(model, REDUCER):
        together = prefilled(model, whole)
        cache = prefilled(model, first)
        if family in ("qwen3_5", "glm5_next"):  # these count positions of images anew in a turn
            positions = together_positions(model, whole)
            second["position_ids"] = positions[..., length:]
        later = logits(model, second, **{CACHE: cache})
        near(later, logits(model, whole)[:, length:])
    assert cache.get_seq_length() == together.get_seq_length()


def together_positions(model, inputs):
    """Positions of a prompt as the model makes them."""
    seen = {}

    def look(_, args, kwargs):
        seen.update(kwargs)

    language = model.model.language_model
    handle = language.register_forward_pre_hook(look, with_kwargs=True)
    with pumer.reduced(model, pumer.Unreduced()):
        logits(model, inputs)
    handle.remove()
    if seen["position_ids"] is None:
        return torch.arange(inputs["input_ids"].shape[1])[None]
    return seen["position_ids"]


def test_a_cache_of_a_fixed_size_is_refused(model, family):
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    inputs = tiny_llm.batch(family, LAYOUT[:1])
    with pumer.reduced(model, REDUCER), pytest.raises(ValueError, match="cache_implementation"):
        logits(model, inputs, **{CACHE: cache})


@pytest.mark.parametrize("back", [2, 8])
def test_going_back(back):
    """Behind the prompt, and into it: only where no layer keeps a state."""
    model, family = tiny_llm.model("mistral_large4"), "mistral_large4"
    inputs = tiny_llm.batch(family, LAYOUT[:1])
    length = inputs["input_ids"].shape[1]
    with pumer.reduced(model, REDUCER):
        cache = prefilled(model, inputs)
        logits(model, {"input_ids": MORE}, **{CACHE: cache})
        cache.crop(-back)
        assert cache.get_seq_length() == length + MORE.shape[1] - back
        again = logits(model, {"input_ids": MORE}, **{CACHE: cache})
        marks = oracle_llm.kept(model, inputs)[0][0]
    stays = min(length, length + MORE.shape[1] - back)
    ids = torch.cat([inputs["input_ids"], MORE], 1)[:, : length + MORE.shape[1] - back]
    longer = inputs | {"input_ids": torch.cat([ids, MORE], 1)}
    longer |= {"attention_mask": torch.ones_like(longer["input_ids"])}
    images = int((ids == IMAGE).sum())
    assert images == int((inputs["input_ids"] == IMAGE).sum())  # else no image would fit
    with oracle_llm.shortened(model, marks[:stays]):
        near(again, logits(model, longer, use_cache=False)[:, -MORE.shape[1] :])


def test_positions_counted_anew():
    model, family = tiny_llm.model("lfm2_vl"), "lfm2_vl"
    inputs = tiny_llm.batch(family, LAYOUT[:1])
    length = inputs["input_ids"].shape[1]
    with pumer.reduced(model, REDUCER, renumber=True):
        marks = oracle_llm.kept(model, inputs)[0][0]
        said = torch.tensor(answer(model, inputs))
        reduced = logits(model, inputs)[:, -1]
    answered = tiny_llm.continued(family, inputs, said[:, :-1])
    with oracle_llm.shortened(model, marks, renumber=True):
        wanted = logits(model, answered, use_cache=False)[:, length - 1 :]
    near(reduced, wanted[:, 0])
    assert torch.equal(tiny_llm.likeliest(wanted), said)


def test_outputs_have_the_length_of_the_prompt(model, family):
    inputs = tiny_llm.batch(family, LAYOUT)
    batch, length = inputs["input_ids"].shape
    with pumer.reduced(model, REDUCER), torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    assert output.logits.shape[:2] == (batch, length)
    assert all(states.shape[:2] == (batch, length) for states in output.hidden_states)


def test_attention_maps_have_the_length_of_the_prompt():
    model = tiny_llm.model("qwen3_5", "eager")
    inputs = tiny_llm.batch("qwen3_5", LAYOUT)
    length = inputs["input_ids"].shape[1]
    with pumer.reduced(model, REDUCER), torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    shapes = {part.shape[2:] for part in maps if part is not None}
    assert shapes == {(length, length)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = tiny_llm.model("qwen3_5").train()
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        inputs = tiny_llm.batch("qwen3_5", LAYOUT)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        labels[:, :-3] = -100
        with pumer.reduced(model, REDUCER):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append(model.model.visual.merger.linear_fc2.weight.grad)
    assert gradients[0].abs().max() > 0
    near(*gradients)


def test_nothing_of_an_image_is_left(model, family):
    inputs = tiny_llm.batch(family, LAYOUT[:1])
    with pumer.reduced(model, NoVision()):
        marks = oracle_llm.kept(model, inputs)[0][0]
        reduced = logits(model, inputs)
    assert torch.equal(marks, inputs["input_ids"][0] != IMAGE)
    with oracle_llm.shortened(model, marks):
        near(reduced[:, -1], logits(model, inputs, use_cache=False)[:, -1])


def test_a_family_with_a_hybrid_language_model():
    """What is inside decides, not the family."""
    text = TEXT | {"layer_types": ["conv", "full_attention", "conv", "conv"]}
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    config = transformers.InternVLConfig(
        vision_config=vision | {"image_size": [48, 48], "patch_size": [8, 8]},
        text_config=text | {"model_type": "lfm2"},
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    model = tiny_llm.with_large_weights(transformers.InternVLForConditionalGeneration(config))
    with pytest.raises(ValueError, match="keep a state in place of keys"):
        pumer.apply(model, FastV(keep=0.5, layer=1))
    assert pumer.active(model) is None
    inputs = tiny_llm.batch("internvl", LAYOUT[:1])
    with pumer.reduced(model, REDUCER):
        marks, reduced = oracle_llm.kept(model, inputs)[0][0], logits(model, inputs)
    with oracle_llm.shortened(model, marks):
        near(reduced[:, -1], logits(model, inputs, use_cache=False)[:, -1])


def test_answers_are_the_same_in_a_batch(model, family):
    """Also with more text behind a padded prompt."""
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, REDUCER):
        said = answer(model, inputs)
        alone = [answer(model, tiny_llm.alone(family, LAYOUT, row)) for row in range(2)]
    assert said == [one[0] for one in alone]
    assert len(said[0]) == GREEDY["max_new_tokens"]
