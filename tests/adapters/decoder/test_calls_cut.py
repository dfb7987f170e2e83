"""However a conversation is cut into calls, the same tokens are kept: prefix caches, turns,
scoring, batches."""

import copy

import calls
import cells
import pytest
import tiny_llm
import torch
from calls import PLACES, answer, generated, near
from tiny_llm import IMAGE

import halves
import pumer
from pumer import CDPruner, DivPrune, FastV, PuMer, PyramidDrop, Random, SparseVLM

SEEDS = 20
NEW = 8
READS = {
    "fastv": FastV(keep=8, layer=2),
    "fastv-early": FastV(keep=0.3, layer=1),
    "pumer": PuMer(prune=0.4, merge=0.2, merge_text=0, layers=(0, 2)),
    "pyramiddrop": PyramidDrop(keep=(0.6, 0.3), layers=(0, 2)),
    "sparsevlm": SparseVLM(keep=(0.5,), layers=(1,)),
    "dart": pumer.DART(keep=0.5, layer=1),
    "tome": pumer.ToMe(r=3, depth=2, proportional=False),
    "cdpruner": CDPruner(keep=0.5),
    "random": Random(prune=0.5, layers=(-1, 1)),
    "divprune": DivPrune(keep=0.5),
    "mmtok": pumer.MMTok(keep=0.5),
    "v2drop": pumer.V2Drop(keep=(0.5, 0.5), layers=(0, 1)),
}
"""Reducers that act inside the language model or read text, and two that do neither."""
EVERY_TIME = halves.sweep(READS, ("fastv", "pumer", "sparsevlm", "cdpruner", "divprune"))
BY_PLACE = ("dart", "DART")
"""Reducers that go by the size of rotated keys: they have to be told the places of a padded row, as
by `generate`."""
LEARNED = {"DynamicViT", "SmartTrim"}
"""Decoders refuse them."""


def whole_prompt(seed, system=12, question=6):
    """A prompt of system words, an image and a question, and its pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 50, (1, system + question), generator=generator)
    image = torch.full((1, 16), IMAGE)
    ids = torch.cat([words[:, :system], image, words[:, system:]], 1)
    return ids, torch.randn(1, 3, 32, 32, generator=generator)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llava(request):
    return tiny_llm.model("llava", request.param)


@pytest.fixture(scope="module")
def model():
    return tiny_llm.model("llava")


def prefill(model, ids, cache=None, **more):
    with torch.no_grad():
        more |= {} if cache is None else calls.cached(model, cache)
        return model(input_ids=ids, use_cache=True, **more)


# --- cached prefixes, turns ---


def in_two_calls(model, ids, pixels, cut):
    """Words up to `cut` first, as a shared system prompt is prefilled once."""
    prefix = calls.cache_of(prefill(model, ids[:, :cut]))
    return prefill(model, ids[:, cut:], prefix, pixel_values=pixels)


@pytest.mark.parametrize(
    "cut",
    halves.sweep(
        [pytest.param(12, id="before the image"), pytest.param(7, id="inside the words")],
        ("before the image",),
    ),
)
@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_cached_prefix_changes_nothing(llava, name, cut):
    right = 0
    for seed in range(SEEDS):
        ids, pixels = whole_prompt(seed)
        with pumer.reduced(llava, READS[name]):
            whole = prefill(llava, ids, pixel_values=pixels).logits[:, -1]
            kept = calls.kept_patches(llava, ids)
            assert 0 < len(kept) < 16
            rest = in_two_calls(llava, ids, pixels, cut).logits[:, -1]
            same = calls.kept_patches(llava, ids) == kept
        right += same and bool((whole - rest).abs().max() < 1e-3)
    assert right == SEEDS


def test_fastv_keeps_what_the_last_token_attends_to_most(llava):
    """In the stock model's own maps, whether or not the system prompt comes from a cache."""
    eager = tiny_llm.model("llava", "eager")
    for seed in range(SEEDS):
        ids, pixels = whole_prompt(seed)
        with torch.no_grad():
            maps = eager(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
        scores = maps[1][0, :, -1].mean(0)[12:28]
        best = sorted((scores.topk(8).indices + 12).tolist())
        with pumer.reduced(llava, READS["fastv"]):
            prefill(llava, ids, pixel_values=pixels)
            assert calls.kept_patches(llava, ids) == best
            in_two_calls(llava, ids, pixels, 12)
            assert calls.kept_patches(llava, ids) == best


@pytest.mark.parametrize("name", EVERY_TIME)
def test_two_turns_are_one_prompt_whose_question_is_the_first(llava, name):
    """What is said after the question was reduced does not guide what is kept of the image."""
    question = torch.zeros(1, 34 + 9, dtype=torch.long)
    question[:, :34] = 1
    for seed in range(SEEDS):
        ids, pixels = whole_prompt(seed)
        later = torch.randint(2, 50, (1, 9), generator=torch.Generator().manual_seed(seed + 99))
        both = torch.cat([ids, later], 1)
        with pumer.reduced(llava, READS[name]):
            first = prefill(llava, ids, pixel_values=pixels)
            kept = calls.kept_patches(llava, ids)
            turns = prefill(llava, later, calls.cache_of(first)).logits[:, -1]
            whole = prefill(llava, both, pixel_values=pixels, question_mask=question)
            assert calls.kept_patches(llava, both) == kept
            near(turns, whole.logits[:, -1], 1e-3)


# --- scoring what was generated ---


def scored(model, full, new, **more):
    """Log-probabilities of the last words as a scoring call gives them, [B,new]."""
    with torch.no_grad():
        logits = model(input_ids=full, logits_to_keep=new + 1, use_cache=False, **more).logits
    picked = full[:, -new:, None]
    return logits[:, :-1].log_softmax(-1).gather(2, picked)[..., 0]


def rollout(model, batch, **more):
    """The sequences that a policy writes, and the log-probabilities it gave its own words."""
    settings = calls.GREEDY | {"max_new_tokens": NEW, "return_dict_in_generate": True}
    out = model.generate(**batch, **settings, output_logits=True, **more)
    logits = torch.stack(out.logits, 1).log_softmax(-1)
    return out.sequences, logits.gather(2, out.sequences[:, -NEW:, None])[..., 0]


def places(mask):
    """Positions of padded rows, as `generate` gives them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def behind(batch, new, placed=False):
    """The inputs besides the words, for sequences with an answer behind each prompt."""
    rows = len(batch["input_ids"])
    answer_ones = torch.ones(rows, new, dtype=torch.long)
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in rest:
            # PaliGemma's prompts are 0 and see each other, its answers are 1 and causal.
            paligemma = name == "token_type_ids" and not rest[name].any()
            kind = torch.full((rows, new), int(paligemma), dtype=rest[name].dtype)
            rest[name] = torch.cat([rest[name], kind], 1)
    mask = torch.cat([batch["attention_mask"], answer_ones], 1)
    return rest | {"attention_mask": mask} | ({"position_ids": places(mask)} if placed else {})


def question_of(batch, new, images=True):
    """1 at the words of the prompt, 0 behind it."""
    ones = batch["attention_mask"].clone()
    if not images:
        ones[batch["input_ids"] == IMAGE] = 0
    return torch.cat([ones, torch.zeros(len(ones), new, dtype=ones.dtype)], 1)


def check_ratio_is_one(model, batch, images=True, placed=False):
    full, old = rollout(model, batch)
    kept = pumer.kept(model)
    new = scored(
        model,
        full,
        NEW,
        **behind(batch, NEW, placed),
        question_mask=question_of(batch, NEW, images),
    )
    torch.testing.assert_close((new - old).exp(), torch.ones_like(new), rtol=0, atol=1e-3)
    return full, old, kept


@pytest.mark.parametrize("images", [True, False], ids=["whole prompt", "its words"])
@pytest.mark.parametrize("name", READS)
def test_generate_then_score(model, name, images):
    for rows in (1, 2):
        batch = calls.inputs("llava", rows=rows)
        with pumer.reduced(model, READS[name]):
            check_ratio_is_one(model, batch, images, name in BY_PLACE)
            before, after = calls.image_lengths(model)
            assert after < before


@pytest.mark.parametrize("name", READS)
def test_labels_say_where_the_prompt_ends(model, name):
    batch = calls.inputs("llava", rows=2)
    with pumer.reduced(model, READS[name]):
        full, old = rollout(model, batch)
        labels = full.clone()
        labels[:, :-NEW] = -100
        with torch.no_grad():
            rest = behind(batch, NEW, name in BY_PLACE)
            logits = model(input_ids=full, labels=labels, use_cache=False, **rest).logits
        picked = full[:, -NEW:, None]
        new = logits[:, -NEW - 1 : -1].log_softmax(-1).gather(2, picked)[..., 0]
    torch.testing.assert_close((new - old).exp(), torch.ones_like(new), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["fastv", "pumer", "sparsevlm", "cdpruner"])
def test_a_question_that_is_a_part_of_the_prompt(model, name):
    """`generate` takes the mask too, and decoding goes on without it."""
    batch = calls.inputs("llava", rows=1)
    length = batch["input_ids"].shape[1]
    part = torch.zeros(1, length, dtype=torch.long)
    part[:, -4:-1] = 1  # not the last word
    more = torch.cat([part, torch.zeros(1, NEW, dtype=torch.long)], 1)
    with pumer.reduced(model, READS[name]):
        full, old = rollout(model, batch, question_mask=part)
        kept = calls.kept_places(model)
        new = scored(model, full, NEW, **behind(batch, NEW), question_mask=more)
        torch.testing.assert_close((new - old).exp(), torch.ones_like(new), rtol=0, atol=1e-3)
        answer(model, batch)
        without = calls.kept_places(model)
    changed = torch.cat([batch["input_ids"][:, :-1], batch["input_ids"][:, -1:] % 40 + 5], 1)
    with pumer.reduced(model, READS[name]):
        answer(model, batch | {"input_ids": changed}, question_mask=part)
        assert calls.kept_places(model) == kept  # a word outside the question has no say
    if name == "fastv":
        assert kept != without  # and the mask does something


def test_a_question_mask_of_another_shape_is_refused(model):
    batch = calls.inputs("llava", rows=2)
    with pumer.reduced(model, READS["fastv"]):
        for mask in (batch["attention_mask"][:, :-1], batch["attention_mask"][0]):
            with pytest.raises(ValueError, match="question_mask"):
                answer(model, batch, question_mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("name", cells.REDUCERS)
def test_generate_then_score_for_every_reducer(name):
    for family in ("llava", "qwen2_vl"):
        model, batch = calls.model(family), calls.inputs(family, rows=2)
        reducer, _, reason = cells.fitting(model, cells.REDUCERS[name], batch)
        if reducer is None:
            assert name in LEARNED or reason
            continue
        with pumer.reduced(model, reducer):
            check_ratio_is_one(model, batch, placed=family == "llava" and name in BY_PLACE)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", tiny_llm.BUILDERS)
def test_generate_then_score_for_every_family(family, place):
    model, batch = calls.model(family), calls.inputs(family, rows=2)
    full, old = rollout(model, batch)
    if not torch.allclose(scored(model, full, NEW, **behind(batch, NEW)), old, atol=1e-4):
        assert (
            family == "paligemma"
        )  # whose prompts see each other, and answers too where nobody marks them
        return
    with pumer.reduced(model, PLACES[place]):
        check_ratio_is_one(model, batch)


# --- an image without a word ---


def image_alone(family="llava"):
    batch = tiny_llm.batch(family, (("i",), (4, "i", 6)))
    alone = tiny_llm.alone(family, (("i",), (4, "i", 6)), 0)
    # Nor a token at the head of the sequence.
    alone = {k: v[:, 1:] if v.shape == alone["input_ids"].shape else v for k, v in alone.items()}
    mask = batch["attention_mask"].clone()
    ids = batch["input_ids"].clone()
    first = int((mask[0] == 0).sum())
    mask[0, first], ids[0, first] = 0, tiny_llm.PAD
    return alone, batch | {"attention_mask": mask, "input_ids": ids}


@pytest.mark.parametrize("name", READS)
def test_an_image_without_a_word(model, name):
    alone, batch = image_alone()
    assert (alone["input_ids"] == IMAGE).all()
    with pumer.reduced(model, READS[name]):
        one = generated(model, alone)
        assert calls.image_lengths(model)[1] < 16
        placed = {"position_ids": places(batch["attention_mask"])} if name in BY_PLACE else {}
        near(answer(model, alone)[0], answer(model, batch, **placed)[0])
        assert one[0] == generated(model, batch)[0]


@pytest.mark.parametrize("reducer", [pumer.NoVision(), pumer.VTW(layer=1)], ids=lambda r: r.name)
def test_nothing_is_left_of_an_image_without_a_word(model, reducer):
    with pumer.reduced(model, reducer):
        for inputs in image_alone():
            with pytest.raises(ValueError, match="prompt 0 is only an image"):
                answer(model, inputs)


@pytest.mark.parametrize("name", READS)
def test_a_row_with_words_and_no_image(model, name):
    layout = ((4, "i", 6), (5,))
    batch, alone = tiny_llm.batch("llava", layout), tiny_llm.alone("llava", layout, 1)
    with pumer.reduced(model, READS[name]):
        assert generated(model, batch)[1] == generated(model, alone)[0]


# --- a cache that goes elsewhere ---


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # stock Qwen2-VL takes no such call
@pytest.mark.parametrize("rows", [1, 2], ids=["one", "padded batch"])
@pytest.mark.parametrize("place", PLACES)
def test_decoding_a_reduced_cache_with_the_stock_model(family, rows, place):
    """An error that says why, or (where nothing of it depends on the reducer) the reduced model's
    answer."""
    model, batch = calls.model(family), calls.inputs(family, rows=rows)
    ones = torch.ones(rows, 1, dtype=torch.long)
    mask = torch.cat([batch["attention_mask"], ones], 1)
    token = torch.full((rows, 1), 7)

    def decode(model, cache):
        with torch.no_grad():
            more = calls.cached(model, cache)
            return model(input_ids=token, attention_mask=mask, **more).logits[:, -1]

    with torch.no_grad(), pumer.reduced(model, PLACES[place]):
        caches = [calls.cache_of(model(**batch)) for _ in range(2)]
        expected = decode(model, caches[0])
    stock = calls.model(family)
    for other in (model, stock):
        try:
            said = decode(other, copy.deepcopy(caches[1]))
        except ValueError as error:
            calls.must_say(error, "reduce")
        else:
            near(said, expected)


def test_decoding_a_reduced_cache_with_another_reducer(model):
    """In decoding there is nothing left to reduce: any reduced model goes on from any reduced
    cache."""
    batch, token = calls.inputs("llava"), torch.tensor([[7]])
    with torch.no_grad():
        with pumer.reduced(model, PLACES["before"]):
            first, second = (calls.cache_of(model(**batch)) for _ in range(2))
            expected = model(input_ids=token, **calls.cached(model, first)).logits
        with pumer.reduced(model, PLACES["inside"]):
            near(model(input_ids=token, **calls.cached(model, second)).logits, expected)
