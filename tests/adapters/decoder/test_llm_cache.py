"""The cache of a reduced decoder: freed at once, taken back in part or whole, shared by beams."""

import copy
import gc
import pickle
import weakref

import oracle_llm
import pytest
import tiny_llm
import torch
import transformers
from tiny_llm import CACHE, GREEDY, answer, logits, near

import pumer
from pumer import NoVision, PuMer, Random
from pumer.adapters.decoder import kv_cache
from pumer.reducers import FastV

MORE = torch.tensor([[7, 9, 11]])


@pytest.fixture(scope="module")
def llava():
    return tiny_llm.model("llava")


@pytest.fixture(scope="module", params=["llava", "gemma3", "qwen3_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_cache_is_freed_without_the_garbage_collector(model, family, beams):
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    with pumer.reduced(model, FastV(keep=0.5, layer=1)):
        gc.collect()
        gc.disable()
        try:
            output = model.generate(
                **inputs, **GREEDY, num_beams=beams, return_dict_in_generate=True
            )
            keys = [weakref.ref(layer.keys) for layer in kv_cache.find(output).layers]
            del output
            assert all(ref() is None for ref in keys)
        finally:
            gc.enable()


def test_a_cache_can_be_copied_and_stored(model, family):
    with pumer.reduced(model, Random(prune=0.5)), torch.no_grad():
        cache = kv_cache.find(model(**tiny_llm.batch(family, ((4, "i", 6),))))
        said = [
            model(input_ids=MORE, **{CACHE: twin}).logits
            for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache)
        ]
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[1], said[2])


def test_layers_that_hold_the_same_go_on_sharing_it(llava):
    """So that one mask does for all of them, whatever beams do to the cache."""
    inputs = tiny_llm.batch("llava", ((4, "i", 6), (2, "i", 3)))
    with pumer.reduced(llava, Random(prune=0.5)):
        cache = kv_cache.find(
            llava.generate(**inputs, **GREEDY, num_beams=2, return_dict_in_generate=True)
        )
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.crop(-9)  # more than was generated
    held = [layer._pumer_layout for layer in cache.layers]
    assert len(set(map(id, held))) == 1
    assert held[0].position_BK.shape == (2, cache.layers[0].keys.shape[2])


def test_a_cache_that_was_reset_is_as_new(model, family):
    inputs, text = tiny_llm.batch(family, ((4, "i", 6),)), tiny_llm.batch(family, ((9,),))

    def after_a_reset():
        with torch.no_grad():
            cache = kv_cache.find(model(**inputs))
            cache.reset()
            assert cache.get_seq_length() == 0
            first = model(**text, **{CACHE: cache}).logits
            assert (
                cache.get_seq_length()
                == text["input_ids"].shape[1]
                == cache.layers[1].keys.shape[2]
            )
            return torch.cat([first, model(input_ids=MORE, **{CACHE: cache}).logits], 1)

    stock = after_a_reset()
    with pumer.reduced(model, Random(prune=0.5)):
        near(after_a_reset(), stock)


# --- tokens taken back ---


@pytest.mark.parametrize(
    "reducer",
    [
        Random(prune=0.5, layers=(-1, 1)),
        FastV(keep=0.5, layer=1),
        PuMer(0.2, 0.3, 0.5, layers=(0, 2)),
    ],
)
def test_drafts_before_the_prefill(model, family, reducer):
    """A prompt that repeats itself has drafts behind it when it is first run; those rejected are
    taken back."""
    inputs = tiny_llm.batch(family, ((8, "i", 8),))
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, 2:5]
    if "token_type_ids" in inputs:
        del inputs["token_type_ids"]  # which transformers does not lengthen by the drafts
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with pumer.reduced(model, reducer):
        plain = answer(model, inputs, max_new_tokens=12)
        lengths.clear()
        assert answer(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3) == plain
    hook.remove()
    assert lengths[0] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    "reducer", [Random(prune=0.5), FastV(keep=0.5, layer=1), PuMer(0.2, 0.3, 0.5, layers=(0, 2))]
)
def test_drafts_of_another_model(llava, reducer):
    torch.manual_seed(1)
    helper = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_llm.TEXT)).eval()
    helper.generation_config.eos_token_id = None
    inputs = tiny_llm.batch("llava", ((4, "i", 6),))
    with pumer.reduced(llava, reducer):
        plain = answer(llava, inputs, max_new_tokens=12)
        assert answer(llava, inputs, max_new_tokens=12, assistant_model=helper) == plain


def test_words_are_no_drafts_where_nothing_is_generated(llava):
    """Who asks for the last logits of a prompt asks the same question."""
    inputs = tiny_llm.batch("llava", ((4, "i", 6),))
    with pumer.reduced(llava, PuMer(0.2, 0.3, 0.5, layers=(0, 2))):
        near(logits(llava, inputs, logits_to_keep=4), logits(llava, inputs)[:, -4:])


def test_going_back_into_the_prompt(model, family):
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    window = getattr(model.config.text_config, "sliding_window", None)
    with pumer.reduced(model, Random(prune=0.5, layers=(-1, 1))), torch.no_grad():
        cache = transformers.DynamicCache(config=model.config.text_config)
        if window:
            cache.activate_past_recording()
        whole = model(**inputs, **{CACHE: cache}).logits
        cache.crop(-3)
        assert cache.get_seq_length() == whole.shape[1] - 3
        near(model(input_ids=inputs["input_ids"][:, -3:], **{CACHE: cache}).logits, whole[:, -3:])


@pytest.mark.parametrize("reducer", [Random(prune=0.5, layers=(1,)), NoVision()])
def test_going_back_into_an_image_takes_what_is_left_of_it(llava, reducer):
    """Places behind the one it goes back to are gone, however many each row still had: it is the
    mask of the rest."""
    inputs, back = tiny_llm.batch("llava", ((4, "i"), (4, "i", 3))), 6
    more, ones = MORE.expand(2, -1), torch.ones(2, 3, dtype=torch.int64)
    mask = torch.cat([inputs["attention_mask"][:, :-back], ones], 1)
    with pumer.reduced(llava, reducer), torch.no_grad():
        marks = oracle_llm.kept(llava, inputs)
        cache = kv_cache.find(llava(**inputs))
        cache.crop(-back)
        rest = llava(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits
    with torch.no_grad():
        states = llava.get_input_embeddings()(inputs["input_ids"])
        image = inputs["input_ids"] == tiny_llm.IMAGE
        states[image] = torch.cat(
            list(llava.model.get_image_features(inputs["pixel_values"]).pooler_output)
        )
        states = torch.cat([states[:, :-back], llava.get_input_embeddings()(more)], 1)
        with oracle_llm.masked(llava, {number: mark[:, :-back] for number, mark in marks.items()}):
            expected = llava(inputs_embeds=states, attention_mask=mask, use_cache=False).logits
    near(rest, expected[:, -3:])
