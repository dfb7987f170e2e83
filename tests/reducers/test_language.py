"""Reducers that a language model's attention guides: which keys count, and how much memory."""

import json
import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import slow_selectors as slow
import tiny_llm
import torch
from pictures import GRIDS, batch, kept, picture, shares
from test_selectors import same
from torch.utils._python_dispatch import TorchDispatchMode

import pumer
from pumer.reducers import (
    DART,
    Chain,
    DivPrune,
    FastV,
    ModelShape,
    PuMer,
    PyramidDrop,
    SparseVLM,
    Tokens,
    TokenShape,
    from_dict,
    to_dict,
)
from pumer.reducers.base import Traits
from pumer.reducers.ops import blocks
from pumer.reducers.ops import saliency as scores
from pumer.reducers.ops.saliency import (
    last_text_attention,
    question_words,
    text_attention,
    text_saliency,
)
from pumer.reducers.sparsevlm import raters
from pumer.reducers.tokens import Context

LAYER = 2
SELECTORS = {
    "fastv": (FastV(keep=0.5, layer=LAYER + 1), slow.pyramiddrop),
    "pyramiddrop": (PyramidDrop(keep=(0.5,), layers=(LAYER,)), slow.pyramiddrop),
    "dart": (DART(keep=0.5, layer=LAYER), partial(slow.dart, pivots=(4, 4))),
    "dart-text": (DART(keep=0.5, layer=LAYER, pivots=(0, 3)), partial(slow.dart, pivots=(0, 3))),
}
MERGERS = {
    f"sparsevlm-{merge}": (
        SparseVLM(keep=(0.4,), layers=(LAYER,), merge=merge),
        partial(slow.sparsevlm, merge=merge),
    )
    for merge in ("mean", "sum", "rating")
}
PRUNING = PuMer(prune=0.5, merge=0, merge_text=0, layers=(LAYER,))
REDUCERS = {name: reducer for name, (reducer, _) in (SELECTORS | MERGERS).items()} | {
    "pumer": PRUNING,
    "pumer-k": replace(PRUNING, score="k_metric"),
    "pumer-qk": replace(PRUNING, score="qk"),
    "chain": Chain((DivPrune(keep=0.5), FastV(keep=0.5, layer=LAYER + 1))),
}
every = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
causal = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


# --- the reducers against slow loops, where order matters ---


@pytest.mark.parametrize("words", [(7, 1, 5, 3), (4, 0, 2, 9)], ids=["words", "one-without"])
@pytest.mark.parametrize("case", [*SELECTORS, *MERGERS])
@causal
def test_it_is_what_the_paper_says(case, causal, words):
    reducer, reference = (SELECTORS | MERGERS)[case]
    for seed in range(6):
        tokens = batch(seed, words=words, layer=LAYER, causal=causal)
        plan = reducer.plan(tokens)
        for row in range(len(GRIDS)):
            if case.startswith("sparsevlm") and words[row] == 0 and not causal:
                continue  # nobody rates: the first tokens stay
            one = picture(tokens, row)
            if case in SELECTORS:
                count = reducer.budget(one.count, LAYER)
                assert kept(plan, tokens, row) == reference(one, count)
            else:
                same(shares(plan, tokens, row), reference(one, round(0.4 * one.count)))


@pytest.mark.parametrize("seed", range(4))
def test_words_after_the_image(seed):
    tokens = batch(seed, layer=LAYER, causal=True)
    after = question_words(tokens)
    for row in range(len(GRIDS)):
        expected = slow.words_after_image(picture(tokens, row))
        assert after[row].nonzero().flatten().tolist() == expected


def test_the_caller_may_say_which_words_are_the_question():
    tokens = batch(0, layer=LAYER, causal=True)
    asked = torch.zeros_like(tokens.mask_BN[:, : tokens.text])
    asked[0, 2:4] = asked[2, 0] = True
    words = question_words(replace(tokens, question_BT=asked))
    assert [row.nonzero().flatten().tolist() for row in words] == [[2, 3], [0], [0], [0, 1, 2]]
    spoken = raters(replace(tokens, question_BT=asked))
    assert not (spoken & ~words).any()


@dataclass(frozen=True)
class Shown(FastV):
    """Keeps what it was shown, after an earlier layer has dropped tokens."""

    name = "shown"
    noted: tuple = field(default=(), compare=False)
    traits = Traits(needs_embeddings=True)

    def select(self, tokens, num_keep_B, most):
        self.noted[0].append(tokens)
        return super().select(tokens, num_keep_B, most)


def test_a_decoder_shows_what_entered_its_first_layer():
    model = tiny_llm.model("llava")
    layout = ((4, "i", 6), (2, "i", 3))
    inputs = tiny_llm.batch("llava", layout)
    noted = []
    reducer = Chain((FastV(keep=5, layer=1), Shown(keep=3, layer=2, noted=(noted,))))
    entered = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with pumer.reduced(model, reducer), torch.no_grad():
        model(**inputs)
    hook.remove()
    (tokens,), states = noted, entered[0]
    embeddings, ids = tokens.embeddings, inputs["input_ids"]
    for row in range(2):
        image = ids[row] == tiny_llm.IMAGE
        words = ~image & inputs["attention_mask"][row].bool()
        assert torch.equal(embeddings.image_BID[row, embeddings.valid_BI[row]], states[row, image])
        shown = embeddings.text_BTD[row, tokens.mask_BN[row, : tokens.text]]
        assert torch.equal(shown, states[row, words])


# --- which keys count ---


def prompt(seed, batch_size=3, image=20, words=12, heads=3, width=6):
    """Prompts of one image each, at places of its own, whole and without padding."""
    generator = torch.Generator().manual_seed(seed)
    length = words + image
    queries, keys = torch.randn(2, batch_size, heads, length, width, generator=generator) * 2
    states = torch.randn(batch_size, length, width, generator=generator)
    places = torch.stack(
        [
            torch.cat(
                [
                    torch.arange(start),
                    torch.arange(start + image, length),
                    start + torch.arange(image),
                ]
            )
            for start in torch.randint(3, words - 2, (batch_size,), generator=generator).tolist()
        ]
    )
    return Tokens(
        mask_BN=torch.ones(batch_size, length, dtype=torch.bool),
        text=words,
        sizes_BN=torch.ones(batch_size, length),
        layer=LAYER,
        num_prefix_tokens=0,
        states_BND=states,
        queries_BHNC=queries,
        keys_BHNC=keys,
        place_BN=places,
    )


def cut(tokens, hidden, **more):
    """The same prompt with these tokens in the context instead, padded there with noise."""
    count = tokens.mask_BN.shape[1]
    shown = [token for token in range(count) if token not in hidden]
    keys = torch.cat(
        [tokens.keys_BHNC[:, :, hidden], torch.full_like(tokens.keys_BHNC[:, :, :2], 9)], 2
    )
    places = torch.cat([tokens.place_BN[:, hidden], tokens.place_BN[:, :2]], 1)
    valid = torch.ones(places.shape, dtype=torch.bool)
    valid[:, -2:] = False
    return replace(
        tokens,
        mask_BN=tokens.mask_BN[:, shown],
        text=sum(token < tokens.text for token in shown),
        sizes_BN=tokens.sizes_BN[:, shown],
        states_BND=tokens.states_BND[:, shown],
        queries_BHNC=tokens.queries_BHNC[:, :, shown],
        keys_BHNC=tokens.keys_BHNC[:, :, shown],
        place_BN=tokens.place_BN[:, shown],
        context=Context(keys, valid, places, **more),
    )


SETTINGS = [{}, {"window": 9}, {"softcap": 1.5}, {"window": 14, "softcap": 3.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_scores_do_not_depend_on_how_a_prompt_is_cut(seed, settings):
    """Whole, with a cached prefix, and with separators and rows' ends that no reducer is shown."""
    tokens = prompt(seed)
    whole = cut(tokens, [], **settings)
    generator = torch.Generator().manual_seed(seed)
    num_prefix_tokens = list(range(int(torch.randint(1, 4, (), generator=generator))))
    scattered = torch.randperm(tokens.text - 1, generator=generator)[:5].sort().values.tolist()
    for hidden in (num_prefix_tokens, scattered):
        shown = [word for word in range(tokens.text) if word not in hidden]
        parts = cut(tokens, hidden, **settings)
        torch.testing.assert_close(
            last_text_attention(parts), last_text_attention(whole), rtol=1e-5, atol=1e-7
        )
        rows = torch.zeros(3, tokens.text)
        rows[:, shown] = 1
        for score in ("mean_head", "first_head"):
            torch.testing.assert_close(
                text_saliency(parts, score), text_saliency(whole, score, rows), rtol=1e-5, atol=1e-6
            )
    parts = cut(tokens, num_prefix_tokens, **settings)
    for reducer in (
        *(reducer for reducer, _ in SELECTORS.values()),
        MERGERS["sparsevlm-rating"][0],
    ):
        image = slice(-(tokens.mask_BN.shape[1] - tokens.text), None)
        ours, expected = reducer.plan(parts), reducer.plan(whole)
        dropped = expected.slot_BN[:, image] < 0
        moved = (expected.slot_BN[:, image] - len(num_prefix_tokens)).masked_fill(dropped, -1)
        assert torch.equal(ours.slot_BN[:, image], moved)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_attention_is_the_softmax_of_the_model(settings):
    tokens = prompt(1)
    tokens = cut(tokens, [1, 4], **settings)
    attention, context = text_attention(tokens), tokens.context
    keys = torch.cat([tokens.keys_BHNC, context.keys_BHMC[:, :, :2]], 2).double().numpy()
    places = torch.cat([tokens.place_BN, context.place_BM[:, :2]], 1).numpy()
    for row, head, word in np.ndindex(3, 3, tokens.text):
        query = tokens.queries_BHNC[row, head, word].double().numpy()
        weights = np.zeros(keys.shape[2])
        for key in range(len(weights)):
            distance = places[row, word] - places[row, key]
            if 0 <= distance < settings.get("window", math.inf):
                logit = query @ keys[row, head, key] / math.sqrt(len(query))
                if "softcap" in settings:
                    logit = settings["softcap"] * math.tanh(logit / settings["softcap"])
                weights[key] = math.exp(logit)
        image = slice(tokens.text, tokens.mask_BN.shape[1])
        expected = torch.tensor(weights[image] / weights.sum(), dtype=torch.float32)
        torch.testing.assert_close(attention[row, head, word], expected, rtol=1e-5, atol=1e-7)


@causal
def test_given_attention_is_read_as_computed_attention_is(causal):
    tokens = batch(0, words=(7, 0, 5, 3), layer=LAYER, causal=causal)
    queries, keys = tokens.queries_BHNC, tokens.keys_BHNC
    seen = tokens.mask_BN[:, None].expand(-1, tokens.mask_BN.shape[1], -1)
    if causal:
        seen = seen & (tokens.place_BN[:, None] <= tokens.place_BN[:, :, None])
    logits = queries @ keys.transpose(2, 3) / math.sqrt(8)
    attention = logits.masked_fill(~seen[:, None], -1e30).softmax(-1)
    known = replace(tokens, attention_BHNN=attention)
    for function in (last_text_attention, text_saliency):
        torch.testing.assert_close(function(known), function(tokens), rtol=1e-5, atol=1e-7)


# --- memory ---


class Largest(TorchDispatchMode):
    """Notes the most elements that an operator's output has."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not func.is_view:
            self.size = max(self.size, output.numel())
        return output


@pytest.mark.parametrize(
    "reducer", [PRUNING, SparseVLM(keep=(0.5,), layers=(LAYER,)), FastV(keep=0.5, layer=LAYER + 1)]
)
def test_memory_is_linear_in_the_words(reducer):
    sizes = []
    for words in (4000, 8000):
        tokens = prompt(0, batch_size=1, image=576, words=words, heads=2, width=4)
        with Largest() as largest:
            reducer.plan(tokens)
        sizes.append(largest.size)
    assert max(sizes) <= 2**20


@causal
def test_blocks_add_up_to_the_whole(causal, monkeypatch):
    grids = ((9, 9), *GRIDS[1:])
    tokens = batch(0, grids, words=(23, 1, 40, 13), width=6, layer=LAYER, causal=causal)
    functions = (text_attention, text_saliency, partial(text_saliency, score="first_head"), raters)
    expected = [function(tokens) for function in functions]
    monkeypatch.setattr(blocks, "BLOCK", 1)
    assert len(scores.TextAttention.of(tokens).blocks()) == 6
    for function, value in zip(functions, expected, strict=True):
        torch.testing.assert_close(function(tokens), value, rtol=1e-5, atol=1e-6)


def test_a_short_prompt_is_one_block():
    """LLaVA's shape in `pumer bench llm`: 576 patches and 64 words at 32 heads of 128 channels."""
    assert len(blocks.row_blocks(64, 8 * 32 * (576 + 64), 128)) == 1
    assert blocks.row_blocks(0, 0, 4) == [slice(0, 0)]
    for width, sizes in ((1, [3, 3, 1]), (5, [5, 2])):
        rows = blocks.row_blocks(7, blocks.BLOCK // 3, width)
        assert [block.stop - block.start for block in rows] == sizes


@pytest.mark.parametrize("name", ["fastv", "dart", "sparsevlm-mean", "pumer"])
def test_several_blocks_compile_into_one_graph(name, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    torch._dynamo.reset()
    plan = torch.compile(REDUCERS[name].plan, fullgraph=True, backend="eager")
    for seed in range(2):
        tokens = batch(seed, words=(30, 1, 5, 3), layer=LAYER, causal=True)
        assert len(scores.TextAttention.of(tokens).blocks()) == 4
        assert torch.equal(plan(tokens).slot_BN, REDUCERS[name].plan(tokens).slot_BN)


# --- budgets and settings ---

LLAVA = ModelShape(depth=32, last=30, image=576)


def test_pyramiddrop_rounds_down_as_published():
    reducer = PyramidDrop().resolve(LLAVA)
    lengths, counts = [575], torch.tensor([575])
    for layer in reducer.layers:
        lengths.append(reducer.lengths(TokenShape(0, lengths[-1], layer, 0))[1])
        counts = torch.cat([counts, reducer.budget(counts[-1:], layer)])
    assert lengths == counts.tolist() == [575, 287, 143, 71]
    for first in range(1, 700):
        count = first
        for share, layer in zip(reducer.keep, reducer.layers, strict=True):
            count = reducer.budget(count, layer)
            assert count == max(1, int(first * share))


@pytest.mark.parametrize(
    "keep", [(0.33, 0.11, 0.05), (0.7, 0.7, 0.7), (0.29, 0.29, 0.2), (0.9, 0.5, 0.3)]
)
def test_shares_of_other_sizes(keep):
    """Off by one at most from shares of a number that only the first stage has seen."""
    reducer = PyramidDrop(keep=keep).resolve(LLAVA)
    every = torch.arange(1, 700)
    for first in every.tolist():
        count = first
        for share, layer in zip(keep, reducer.layers, strict=True):
            before, count = count, reducer.budget(count, layer)
            assert 0 <= max(1, int(first * share)) - count <= 1 or layer > reducer.layers[1]
            if keep[0] == keep[1] and layer == reducer.layers[1]:
                assert count == before
    for layer in reducer.layers:
        budgets = reducer.budget(every, layer).tolist()
        assert budgets == [reducer.budget(count, layer) for count in every.tolist()]
        assert budgets == sorted(budgets)


def test_dart_worked_case():
    """Published: 5 words, 64 patches, 9 words, 16 kept besides the pivots."""
    generator = torch.random.fork_rng()
    with generator:
        torch.manual_seed(1)
        states, keys = torch.randn(1, 78, 32), torch.randn(1, 4, 78, 8)
    keys[:, :, 0] *= 3
    order = torch.cat([torch.arange(5), torch.arange(69, 78), torch.arange(5, 69)])
    tokens = Tokens(
        mask_BN=torch.ones(1, 78, dtype=torch.bool),
        text=14,
        sizes_BN=torch.ones(1, 78),
        layer=1,
        num_prefix_tokens=0,
        states_BND=states[:, order],
        queries_BHNC=keys[:, :, order],
        keys_BHNC=keys[:, :, order],
        place_BN=order[None],
    )
    published = {0, 4, 5, 13, 16, 17, 18, 19, 22, 30, 35, 42, 45, 46, 47, 49, 52, 54, 59, 63}
    ours = set(kept(DART(keep=20).plan(tokens), tokens, 0))
    assert len(ours & published) == 19  # the order of the pivots is another one


@pytest.mark.parametrize(("average", "merge"), [(True, "rating"), (False, "sum")])
def test_an_older_setting_of_sparsevlm_still_loads(average, merge):
    saved = {
        "reducer": "sparsevlm",
        "keep": [5],
        "layers": [1],
        "recycle": True,
        "average": average,
    }
    reducer = from_dict(saved)
    assert reducer == SparseVLM(keep=(5,), layers=(1,), merge=merge)
    assert from_dict(json.loads(json.dumps(to_dict(reducer)))) == reducer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseVLM(merge="max"), "merge is one of mean, sum, rating"),
        (lambda: DART(pivots=(4,)), "pivots are the numbers"),
        (lambda: DART(pivots=(4, 0.5)), "pivots are the numbers"),
        (lambda: from_dict({"reducer": "sparsevlm", "averages": True}), "no setting averages"),
    ],
)
def test_settings_that_make_no_sense_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the sums of the layer's own kernel ---


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_sums_of_the_kernel_give_the_same_attention(family, monkeypatch):
    """With the kernel's log-sum-exp and without it, and the kernel's output is the same."""
    model, inputs = tiny_llm.model(family), tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3)))
    shown = []

    class Watched(PuMer):
        def plan(self, tokens):
            shown.append(tokens)
            return super().plan(tokens)

    def run():
        with pumer.reduced(model, Watched(0.3, 0, 0, layers=(1,))):
            return tiny_llm.logits(model, inputs)

    with_sums = run()
    assert shown[0].normalizer_BHN is not None
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 0)
    without = run()
    assert shown[1].normalizer_BHN is None
    assert torch.equal(with_sums, without)
    near, far = (text_attention(tokens) for tokens in shown)
    words_BT = shown[0].valid_BN[:, : shown[0].text]
    assert torch.allclose(near.transpose(1, 2)[words_BT], far.transpose(1, 2)[words_BT], atol=1e-6)
