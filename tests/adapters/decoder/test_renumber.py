"""`renumber`: positions of what is left are those of a prompt that never had the other tokens."""

import json

import calls
import oracle_llm
import pytest
import tiny_llm
import torch
from tiny_llm import CACHE

import pumer
from pumer import FastV, PuMer, Uniform

FAMILIES = [family for family in tiny_llm.BUILDERS if not family.startswith("qwen")]
LAYOUTS = {
    "single": ((4, "i", 6),),
    "padded": ((4, "i", 6), (2, "i", "i", 3), (5,)),
}
STAGES = {
    "before": Uniform(prune=0.5, layers=(-1,)),
    "stages": Uniform(prune=0.4, layers=(0, 2)),
    "fastv": FastV(keep=2, layer=1),
}
SETTINGS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
MORE = torch.tensor([[7, 9, 11]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


@pytest.fixture(scope="module")
def llava():
    return tiny_llm.model("llava")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stages", STAGES)
def test_positions_are_counted_anew_in_every_layer(model, family, stages, layout):
    """Of the stock model with tokens masked and every layer's positions counted without them."""
    inputs = tiny_llm.batch(family, LAYOUTS[layout])
    with pumer.reduced(model, STAGES[stages], renumber=True):
        marks = oracle_llm.kept(model, inputs, generating=True)
        reduced = model.generate(**inputs, **SETTINGS)
    with oracle_llm.masked(model, marks, renumber=True):
        expected = model.generate(**inputs, **SETTINGS)
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert reduced.sequences.tolist() == expected.sequences.tolist()


def test_it_is_the_prompt_without_these_tokens(llava):
    """As if the language model was given nothing else, in the answer too."""
    inputs, seen = tiny_llm.batch("llava"), []
    language = llava.model.language_model
    handle = language.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    tiny_llm.logits(llava, inputs)
    handle.remove()
    with pumer.reduced(llava, STAGES["before"], renumber=True):
        reduced = llava.generate(**inputs, **SETTINGS)
        places = calls.kept_places(llava)
    with pumer.reduced(llava, STAGES["before"]):
        original = llava.generate(**inputs, **SETTINGS)
    short = seen[0][:, places]
    answer = reduced.sequences[:, inputs["input_ids"].shape[1] :]
    written = torch.cat([short, language.embed_tokens(answer[:, :-1])], 1)
    with torch.no_grad():
        states = language(inputs_embeds=written).last_hidden_state
        expected = llava.lm_head(states[:, short.shape[1] - 1 :])
    torch.testing.assert_close(torch.stack(reduced.logits, 1), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(original.logits[0], reduced.logits[0], atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "gemma3", "smolvlm"])
def test_a_conversation_goes_on_as_it_would_in_one_piece(family):
    model, inputs = tiny_llm.model(family), tiny_llm.batch(family)
    ids = torch.cat([inputs["input_ids"], MORE], 1)
    longer = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in inputs:
        kinds = inputs["token_type_ids"]
        longer["token_type_ids"] = torch.nn.functional.pad(kinds, (0, MORE.shape[1]))
    with pumer.reduced(model, STAGES["stages"], renumber=True), torch.no_grad():
        cache = calls.cache_of(model(**inputs, use_cache=True))
        mask = longer["attention_mask"]
        continued = model(input_ids=MORE, attention_mask=mask, **{CACHE: cache}).logits
        at_once = model(**longer).logits[:, -MORE.shape[1] :]
    torch.testing.assert_close(continued, at_once, rtol=1e-4, atol=1e-4)


def test_nothing_gone_changes_nothing(llava):
    inputs = tiny_llm.batch("llava")
    stock = tiny_llm.logits(llava, inputs)
    with pumer.reduced(llava, PuMer(0, 0, 0, layers=(1,)), renumber=True):
        tiny_llm.near(tiny_llm.logits(llava, inputs), stock)


def test_it_is_in_force_again_after_a_with_block(llava):
    inputs = tiny_llm.batch("llava")
    pumer.apply(llava, STAGES["before"], renumber=True)
    try:
        expected = tiny_llm.logits(llava, inputs)
        with pumer.reduced(llava, STAGES["before"]):
            assert not torch.equal(tiny_llm.logits(llava, inputs), expected)
        assert torch.equal(tiny_llm.logits(llava, inputs), expected)
    finally:
        pumer.remove(llava)


@pytest.mark.parametrize("renumber", [True, False])
def test_it_is_saved(tmp_path, renumber):
    model, inputs = tiny_llm.model("llava"), tiny_llm.batch("llava")
    pumer.apply(model, STAGES["before"], renumber=renumber)
    pumer.save(model, tmp_path / "model")
    assert ("renumber" in json.loads((tmp_path / "model" / "pumer.json").read_text())) == renumber
    loaded = pumer.load(tmp_path / "model")
    assert torch.equal(tiny_llm.logits(loaded, inputs), tiny_llm.logits(model, inputs))


@pytest.mark.parametrize("family", ["qwen2_vl", "ViLT"])
def test_other_positions_are_refused(family):
    model = calls.model(family)
    with pytest.raises(ValueError, match=r"cannot be renumbered.*leave renumber out"):
        pumer.apply(model, Uniform(prune=0.5, layers=(0,)), renumber=True)
    assert pumer.active(model) is None
