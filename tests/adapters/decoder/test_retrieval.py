"""Retrievers: a reduced page has a vector for every token that is left."""

import oracle_llm
import pytest
import tiny_retrieval
import torch
import transformers
from tiny_llm import near
from tiny_retrieval import vectors

import pumer
from pumer import FastV, FoPru, PuMer, Random, Uniform

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,), (3, "i", 1))
FULL = 2
"""A layer that sees everything, in every retriever."""
PRUNING = {
    "before": Random(prune=0.5),
    "both": Random(prune=0.4, layers=(-1, 1)),
    "fastv": FastV(keep=0.5, layer=FULL + 1),
    "tower": FoPru(keep=0.5),
}
MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, FULL))


@pytest.fixture(scope="module", params=tiny_retrieval.RETRIEVERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return tiny_retrieval.model(name)


def added(model):
    """Hooks, and what is set on instances."""
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return hooks, [sorted(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_reducing_nothing_changes_nothing(model, name, side):
    inputs = tiny_retrieval.batch(name, LAYOUT, side)
    stock, before = vectors(model, inputs), added(model)
    with pumer.reduced(model, Uniform(prune=0, layers=(-1, 1))):
        for got, wanted in zip(vectors(model, inputs), stock, strict=True):
            near(got, wanted)
    for got, wanted in zip(vectors(model, inputs), stock, strict=True):
        assert torch.equal(got, wanted)
    assert added(model) == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reducer", PRUNING)
def test_dropping_is_masking(model, name, reducer, side):
    inputs = tiny_retrieval.batch(name, LAYOUT, side)
    stock = vectors(model, inputs)
    with pumer.reduced(model, PRUNING[reducer]):
        marks, reduced = oracle_llm.kept(model, inputs), vectors(model, inputs)
        positions = pumer.kept(model)
        assert pumer.report(model).active
    with oracle_llm.masked(model, marks), torch.no_grad():
        expected = model(**inputs).embeddings
    real = inputs["attention_mask"].bool()
    stays = marks[max(marks)] & real
    changed = 0.0
    for row, got in enumerate(reduced):
        near(got, expected[row, stays[row]])
        assert positions[row][positions[row] >= 0].tolist() == stays[row].nonzero()[:, 0].tolist()
        same = stock[row][stays[row][real[row]]]
        changed = max(changed, float((got - same).abs().max()))
    assert changed > 1e-3, "the tokens dropped do not matter"
    is_image = inputs["input_ids"] == tiny_retrieval.tiny_llm.IMAGE
    assert not ((real & ~stays) & ~is_image).any()
    assert [len(got) < len(all_) for got, all_ in zip(reduced, stock, strict=True)] == [
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("reducer", [MERGING, *PRUNING.values()])
def test_a_row_of_a_batch_is_the_page_alone(model, name, reducer):
    with pumer.reduced(model, reducer):
        together = vectors(model, tiny_retrieval.batch(name, LAYOUT))
        for row, got in enumerate(together):
            if isinstance(reducer, Random) and row:
                continue  # draws one row after the other
            (expected,) = vectors(model, tiny_retrieval.alone(name, LAYOUT, row))
            near(got, expected)


def test_queries_pass_unchanged(model, name, recwarn):
    inputs = tiny_retrieval.batch(name, ((5,), (3,)))
    with torch.no_grad():
        stock = model(**inputs)
        with pumer.reduced(model, PRUNING["both"]):
            reduced = model(**inputs)
    assert type(reduced) is type(stock)
    assert torch.equal(reduced.embeddings, stock.embeddings)
    assert not [warning for warning in recwarn if "reduced" in str(warning.message)]


def test_late_interaction_scores_reduced_pages(model, name):
    score = transformers.ColPaliProcessor.score_retrieval
    queries = vectors(model, tiny_retrieval.batch(name, ((5,), (3,))))
    with pumer.reduced(model, PRUNING["both"]):
        pages = tiny_retrieval.batch(name, LAYOUT)
        with torch.no_grad():
            output = model(**pages)
        padded = score(None, queries, output.embeddings)
        listed = score(None, queries, vectors(model, pages))
    near(padded, listed)
    assert padded.shape == (2, 4)


def test_a_tuple_ends_with_the_mask(model, name):
    inputs = tiny_retrieval.batch(name, LAYOUT)
    with torch.no_grad(), pumer.reduced(model, PRUNING["fastv"]):
        output, values = model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(values[0], output.embeddings)
    assert torch.equal(values[-1], output.attention_mask)
    assert output.attention_mask.shape == output.embeddings.shape[:2]


def test_gradients_reach_every_kept_vector(model, name):
    inputs = tiny_retrieval.batch(name, LAYOUT)
    with pumer.reduced(model, PRUNING["both"]):
        model(**inputs).embeddings.square().sum().backward()
    assert model.embedding_proj_layer.weight.grad is not None
    model.zero_grad()


def test_the_report_counts_a_vector_for_every_token(model, name):
    stock = pumer.report(model)
    with pumer.reduced(model, PRUNING["before"]):
        report = pumer.report(model)
    assert report.macs < report.base_macs == stock.macs
    width = model.embedding_proj_layer.in_features * model.embedding_proj_layer.out_features
    assert stock.parts["head"] == sum(stock.entry) * width
    assert "a further token" not in str(report)


def test_another_model_inside_is_refused():
    model = tiny_retrieval.model("colpali")
    model.vlm = tiny_retrieval.tiny_llm.model("llava").model
    with pytest.raises(ValueError, match="LlavaModel"):
        pumer.apply(model, PRUNING["before"])


def test_attention_within_a_window_is_refused():
    model = tiny_retrieval.model("colmodernvbert")
    with pytest.raises(ValueError, match=r"layer 2, .* give layers that see everything, 1, 3$"):
        pumer.apply(model, FastV(keep=0.5, layer=FULL))
    assert pumer.active(model) is None
    pumer.apply(model, Random(prune=0.4, layers=(1,)))  # which reads none
