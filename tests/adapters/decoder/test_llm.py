"""Reduced decoders in every way they are used: batches, caches, beams, conversations, training."""

import copy

import pytest
import tiny_llm
import torch
from tiny_llm import CACHE, GREEDY, answer, logits, near
from transformers import StaticCache

import pumer
from pumer import NoVision, PuMer, Random, ToMe, Uniform, Unreduced
from pumer.adapters.decoder import kv_cache
from pumer.reducers import FastV, V2Drop

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 2))
REDUCERS = {
    "pumer": MERGING,
    "fastv": FastV(keep=0.5, layer=1),
    "v2drop": V2Drop(keep=(0.5, 0.5), layers=(0, 1)),
    "random": Random(prune=0.4, layers=(-1, 1)),
    "tome": ToMe(r=2, depth=2, proportional=False),
}


@pytest.fixture(scope="module", params=tiny_llm.BUILDERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


@pytest.fixture(scope="module")
def llava():
    return tiny_llm.model("llava")


def test_nothing_changes_where_nothing_is_reduced(model, family):
    inputs = tiny_llm.batch(family, LAYOUT)
    stock = logits(model, inputs)
    for reducer in (
        Unreduced(),
        Uniform(prune=0, layers=(-1, 1)),
        PuMer(0, 0, 0, layers=(0, 2)),
        FastV(keep=1.0),
    ):
        with pumer.reduced(model, reducer):
            near(logits(model, inputs), stock)


def test_remove_leaves_no_trace(family):
    model = tiny_llm.model(family)

    def state():
        return {
            name: (sorted(vars(part)), len(part._forward_pre_hooks), len(part._forward_hooks))
            for name, part in model.named_modules()
        }

    inputs = tiny_llm.batch(family, LAYOUT)
    stock, before = (
        logits(model, inputs),
        state(),
    )  # transformers puts hooks of its own on in the first forward
    pumer.apply(model, MERGING)
    logits(model, inputs)
    pumer.remove(model)
    assert state() == before
    assert torch.equal(logits(model, inputs), stock)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_row_of_a_batch_is_the_sample_alone(model, family, name):
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, REDUCERS[name]):
        together, said = logits(model, inputs), answer(model, inputs)
        for row in range(len(LAYOUT)):
            alone = tiny_llm.alone(family, LAYOUT, row)
            length = alone["input_ids"].shape[1]
            near(together[row : row + 1, -length:], logits(model, alone))
            assert answer(model, alone) == said[row : row + 1]


@pytest.mark.parametrize("name", REDUCERS)
def test_the_cache_makes_no_difference(model, family, name):
    if family.startswith("qwen"):
        pytest.skip(
            "without a cache transformers' Qwen-VL gets the positions of its images wrong, "
            "reduced or not"
        )
    inputs = tiny_llm.batch(family, LAYOUT[:2])
    # A step without a cache reduces anew, by the words it has said too: only what does not look at
    # them is the same.
    reducer = Random(prune=0.4) if name in ("pumer", "fastv") else REDUCERS[name]
    with pumer.reduced(model, reducer):
        assert answer(model, inputs) == answer(model, inputs, use_cache=False)


@pytest.mark.parametrize("name", REDUCERS)
def test_eager_attention_gives_the_same(model, family, name):
    inputs = tiny_llm.batch(family, LAYOUT)
    eager = tiny_llm.model(family, "eager")
    with pumer.reduced(model, REDUCERS[name]), pumer.reduced(eager, REDUCERS[name]):
        real = inputs["attention_mask"].bool()
        near(logits(eager, inputs)[real], logits(model, inputs)[real])
        assert answer(eager, inputs) == answer(model, inputs)


def test_prompts_without_images_are_left_alone(model, family):
    inputs = tiny_llm.batch(family, ((9,), (4,)))
    stock, said = logits(model, inputs), answer(model, inputs)
    with pumer.reduced(model, MERGING):
        assert torch.equal(logits(model, inputs), stock)
        assert answer(model, inputs) == said


def test_two_models_side_by_side(family):
    one, two = tiny_llm.model(family), tiny_llm.model(family)
    inputs = tiny_llm.batch(family, LAYOUT)
    stock = logits(one, inputs)
    pumer.apply(one, MERGING)
    first = logits(one, inputs)
    assert torch.equal(logits(two, inputs), stock)
    pumer.apply(two, NoVision())
    logits(two, inputs)
    assert torch.equal(logits(one, inputs), first)


def test_a_copy_is_reduced_by_itself(family):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, LAYOUT)
    stock = logits(model, inputs)
    pumer.apply(model, MERGING)
    reduced, twin = logits(model, inputs), copy.deepcopy(model)
    pumer.remove(model)
    assert torch.equal(logits(model, inputs), stock)
    assert torch.equal(logits(twin, inputs), reduced)
    pumer.remove(twin)
    assert torch.equal(logits(twin, inputs), stock)


@pytest.mark.parametrize("name", REDUCERS)
def test_beams(model, family, name):
    """A beam search over one sample is that over the sample in a batch, and its best beam has the
    score it says."""
    settings = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, REDUCERS[name]):
        together = model.generate(**inputs, **(GREEDY | settings))
        for row in range(2):
            alone = tiny_llm.alone(family, LAYOUT, row)
            one = model.generate(**alone, **(GREEDY | settings))
            near(together.sequences_scores[row], one.sequences_scores[0])
            assert together.sequences[row, -6:].tolist() == one.sequences[0, -6:].tolist()


def test_several_answers_to_one_prompt(model, family):
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, MERGING):
        twice = answer(model, inputs, num_beams=2, num_return_sequences=2)
    assert len(twice) == 2 * len(LAYOUT)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_conversation_goes_on_with_the_cache(model, family, name):
    """The next turn through the cache of the last one is the same as all of it at once, tokens
    dropped alike."""
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    more = torch.tensor([[7, 9, 11, 5]])
    with pumer.reduced(model, REDUCERS[name]), torch.no_grad():
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = kv_cache.find(first)
        counted = cache.get_seq_length()
        assert counted == first.sequences.shape[1] - 1
        second = torch.cat([first.sequences, more], 1)
        rest = {"input_ids": second, "attention_mask": torch.ones_like(second)}
        if "mm_token_type_ids" in inputs:
            rest["mm_token_type_ids"] = torch.zeros_like(second, dtype=torch.int)
            rest["mm_token_type_ids"][:, : inputs["input_ids"].shape[1]] = inputs[
                "mm_token_type_ids"
            ]
        twin = copy.deepcopy(cache)
        said = model.generate(**rest, **{CACHE: cache}, **GREEDY)
        # One by one through the copy of the cache, as decoding goes.
        for place in range(counted, second.shape[1]):
            step = model(input_ids=second[:, place : place + 1], **{CACHE: twin}).logits
        assert step[0, -1, :50].argmax() == said[0, second.shape[1]]


def test_a_second_image_in_a_conversation(llava):
    """A turn with an image of its own is reduced after turns that were."""
    both = tiny_llm.batch("llava", ((4, "i", 6, "i", 3),))
    ids, pixels = both["input_ids"], both["pixel_values"]
    cut = 1 + 4 + 16 + 6
    with pumer.reduced(llava, Random(prune=0.5)) as model, torch.no_grad():
        whole = model(**both).logits
        cache = kv_cache.find(model(input_ids=ids[:, :cut], pixel_values=pixels[:1]))
        rest = model(input_ids=ids[:, cut:], pixel_values=pixels[1:], **{CACHE: cache})
    near(rest.logits[:, -3:], whole[:, -3:])
    assert kv_cache.find(rest).get_seq_length() == ids.shape[1]
    assert {layer.keys.shape[2] for layer in kv_cache.find(rest).layers} == {ids.shape[1] - 16}


def test_drafted_tokens_are_checked_together(model, family):
    """Prompt lookup and assisted generation give several tokens at once, and crop the cache."""
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    with pumer.reduced(model, FastV(keep=0.5, layer=1)):
        plain = answer(model, inputs, max_new_tokens=12)
        assert answer(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3) == plain


def test_caches_of_one_length_are_refused(llava):
    inputs = tiny_llm.batch("llava", ((4, "i", 6),))
    text = tiny_llm.batch("llava", ((8,),))
    with pumer.reduced(llava, MERGING):
        with pytest.raises(ValueError, match="DynamicCache"):
            llava.generate(**inputs, **GREEDY, cache_implementation="static")
        with pytest.raises(ValueError, match="DynamicCache"):
            llava(
                **inputs, **{CACHE: StaticCache(config=llava.config.text_config, max_cache_len=64)}
            )
        llava.generate(**text, **GREEDY, cache_implementation="static")  # nothing is reduced here


@pytest.mark.parametrize("name", REDUCERS)
def test_cache_holds_what_is_left(model, family, name):
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    with pumer.reduced(model, REDUCERS[name]), torch.no_grad():
        cache = kv_cache.find(model(**inputs))
        lengths = pumer.active(model).lengths
        text, image, _ = pumer.active(model).entry
    rest = inputs["input_ids"].shape[1] - text - image
    window = getattr(model.config.text_config, "sliding_window", None)
    for layer, left in zip(cache.layers, lengths, strict=False):
        held = rest + sum(left)
        assert layer.keys.shape[2] == (min(held, window - 1) if layer.is_sliding else held)


# --- training ---


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family, checkpointing):
    model = tiny_llm.model(family).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs = tiny_llm.batch(family, LAYOUT[:2], "right")
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    labels[inputs["attention_mask"] == 0] = -100
    pumer.apply(model, MERGING)
    output = model(**inputs, labels=labels, use_cache=False)
    assert output.logits.shape[:2] == labels.shape
    output.loss.backward()
    trunk = pumer.active(model).adapter.language(model)
    grads = [layer.mlp.up_proj.weight.grad for layer in trunk.layers]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    if checkpointing:
        model.activation_checkpointing_disable()
        loss = output.loss.detach()
        near(model(**inputs, labels=labels, use_cache=False).loss.detach(), loss)


def test_the_answer_does_not_guide_what_is_kept(llava):
    inputs = tiny_llm.batch("llava", ((4, "i", 9),))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -4:] = torch.tensor([[3, 4, 5, 6]])
    with pumer.reduced(llava, PuMer(0.5, 0.2, 0, layers=(0,))) as model:
        kept = []
        for one in (inputs, other):
            with pumer.trace(model) as steps, torch.no_grad():
                model(**one, labels=labels)
            kept.append(steps[0].plan.slot_BN)
        # Rows of the view: the question, then the image.
        assert kept[0].shape == kept[1].shape == (1, 1 + 4 + 5 + 16)
        assert torch.equal(*kept)


def test_labels_follow_the_tokens_that_are_left(llava):
    """The loss is that of the shorter sequence: each label is asked of the last token that is left
    before it."""
    inputs = tiny_llm.batch("llava", ((4, "i", 6),))
    labels = inputs["input_ids"].clone()
    labels[labels == tiny_llm.IMAGE] = -100
    with pumer.reduced(llava, NoVision()), torch.no_grad():
        loss = llava(**inputs, labels=labels).loss
    bare = {name: inputs[name][:, labels[0] != -100] for name in ("input_ids", "attention_mask")}
    places = torch.arange(inputs["input_ids"].shape[1])[labels[0] != -100]
    with torch.no_grad():
        expected = llava(**bare, position_ids=places[None], labels=bare["input_ids"]).loss
    near(loss, expected)


def test_hidden_states_have_the_length_of_the_prompt(llava):
    inputs = tiny_llm.batch("llava", LAYOUT)
    with pumer.reduced(llava, Random(prune=0.5, layers=(-1, 1))), torch.no_grad():
        states = llava(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == tiny_llm.LAYERS + 1
    assert {tuple(state.shape[:2]) for state in states} == {tuple(inputs["input_ids"].shape)}


# --- what cannot be done is said ---


def test_bad_settings(llava):
    for reducer, message in (
        (ToMe(r=2, depth=2, proportional=True), "proportional=False"),
        (FastV(layer=tiny_llm.LAYERS), "last layer"),
        (PuMer(layers=(1,), official=True), "official=False"),
        (FastV(layer=99), "layers 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            pumer.apply(llava, reducer)
        assert pumer.active(llava) is None
    llava.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        pumer.apply(llava, FastV())
    llava.set_attn_implementation("sdpa")


def test_placeholders_that_do_not_match(llava):
    inputs = tiny_llm.batch("llava", ((4, "i", 6),))
    two = torch.cat([inputs["pixel_values"]] * 2)
    with pumer.reduced(llava, FastV(layer=1)):
        with pytest.raises(ValueError, match="16 image placeholders and the images 32 features"):
            llava(**(inputs | {"pixel_values": two}))
        logits(llava, inputs)  # and it goes on
