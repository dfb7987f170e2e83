"""Packed rows: the same outputs and gradients as padded ones, at the cost of the real tokens."""

import matrix
import pytest
import tiny
import torch
from test_compile import NoWaiting

import pumer
from pumer.adapters.encoder import attention as kernels
from pumer.adapters.encoder import joint, meter, packing
from pumer.adapters.encoder import reduce as encoder
from pumer.costs.report import last_forward_parts

FAMILIES = {name: kind for name, kind in tiny.FAMILIES.items() if name != "BridgeTower"}
"""Those that pack."""
EVERY_FAMILY = pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES)
EVERY_REDUCER = pytest.mark.parametrize(
    ("kind", "reducer"),
    [case for case in matrix.on_every_family() if case.values[0] in FAMILIES.values()],
)
RAGGED = {name: matrix.REDUCERS[name] for name in ("none", "pumer", "smarttrim", "energy", "dymu")}


def forward(model, inputs, **settings):
    with torch.no_grad():
        return model(**inputs, **settings)


def close(actual, expected, where=...):
    torch.testing.assert_close(actual[where], expected[where], rtol=0, atol=1e-5)


def both(kind, reducer, inputs, **settings):
    """Outputs of the padded and of the packed model, and the latter's patch."""
    model = pumer.apply(tiny.model(kind), reducer)
    padded = forward(model, inputs, **settings)
    pumer.apply(model, reducer, pack=True)
    packed = forward(model, inputs, **settings)
    return padded, packed, pumer.active(model)


@EVERY_REDUCER
def test_packed_equals_padded(kind, reducer):
    inputs = tiny.batch(kind)
    padded, packed, patch = both(kind, reducer, inputs)
    close(packed.logits, padded.logits)
    assert all(len(set(rows)) > 1 for rows in patch.rows[:2]), "all rows are of one length"
    for lengths, (text, image) in zip(patch.rows, patch.lengths, strict=True):
        assert max(length for length, _ in lengths) <= text
        assert max(length for _, length in lengths) <= image
    assert [sum(lengths) for lengths in patch.rows[-1]] == patch.kept.ge(0).sum(1).tolist()


@pytest.mark.parametrize(
    "kind", [kind for kind in tiny.CLASSES if not kind.startswith("BridgeTower")]
)
def test_every_class_returns_what_it_returns_padded(kind):
    inputs = tiny.batch(kind)
    settings = {"output_hidden_states": True} if kind.endswith(("Model", "Token")) else {}
    padded, packed, _ = both(kind, matrix.REDUCERS["pumer"], inputs, **settings)
    real = inputs["attention_mask"].bool()
    answers = tiny.answer(packed), tiny.answer(padded)
    close(*answers, real if answers[0].ndim == 3 else ...)
    assert list(packed) == list(padded)
    for name in padded:
        if not name.endswith("hidden_states"):
            continue
        for ours, theirs in zip(packed[name], padded[name], strict=True):
            assert ours.shape == theirs.shape
            if not name.startswith("image"):
                text = slice(0, real.shape[1])
                close(ours[:, text], theirs[:, text], real)
                assert not ours[:, text][~real].any(), "padding has states"


@EVERY_FAMILY
@pytest.mark.parametrize("reducer", RAGGED.values(), ids=RAGGED)
def test_a_row_equals_the_sample_alone(kind, reducer):
    model, inputs = pumer.apply(tiny.model(kind), reducer, pack=True), tiny.batch(kind)
    together = forward(model, inputs).logits
    for row in range(len(together)):
        close(forward(model, tiny.alone(inputs, row)).logits[0], together[row])


@EVERY_FAMILY
@pytest.mark.parametrize("reducer", matrix.IDENTITIES.values(), ids=matrix.IDENTITIES)
def test_ratio_0_is_the_stock_model_and_removal_gives_it_back(kind, reducer):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    stock = forward(model, inputs).logits
    with pumer.reduced(model, reducer, pack=True):
        close(forward(model, inputs).logits, stock)
    if kind in tiny.METER:  # stock ViLT draws its patches in random order
        assert torch.equal(forward(model, inputs).logits, stock)
    assert pumer.active(model) is None


@EVERY_FAMILY
@pytest.mark.parametrize("reducer", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("words", [0, 1])
def test_texts_of_no_word_and_of_one(kind, reducer, words):
    inputs = tiny.batch(kind)
    inputs["attention_mask"][1, words:] = 0
    inputs["attention_mask"][2, 1:] = 0
    padded, packed, patch = both(kind, reducer, inputs)
    close(packed.logits, padded.logits)
    assert patch.rows[0][1][0] == 1, "the first token stays, as it is pooled"


@EVERY_FAMILY
@pytest.mark.parametrize("reducer", RAGGED.values(), ids=RAGGED)
def test_other_ways_to_attend_give_the_same(monkeypatch, kind, reducer):
    inputs = tiny.batch(kind)
    # Eager attention of METER's text to a text without any word is not a number, packed or not.
    inputs["attention_mask"][1, kind in tiny.METER :] = 0
    padded, _, _ = both(kind, reducer, inputs)
    eager = pumer.apply(tiny.model(kind), reducer, pack=True, attention="eager")
    close(forward(eager, inputs).logits, padded.logits)
    monkeypatch.setattr(joint, "BY_ROW", ())  # as on a GPU
    monkeypatch.setattr(kernels, "attend_rows", None)
    close(both(kind, reducer, inputs)[1].logits, padded.logits)


@EVERY_FAMILY
def test_rows_of_one_length_are_not_packed(monkeypatch, kind):
    inputs = tiny.batch(kind, padding=0)
    inputs |= {name: torch.ones_like(inputs[name]) for name in ("attention_mask", "pixel_mask")}
    monkeypatch.setattr(kernels, "attend_rows", None)
    monkeypatch.setattr(packing.Rows, "pack", None)
    padded, packed, patch = both(kind, matrix.REDUCERS["pumer"], inputs)
    assert torch.equal(packed.logits, padded.logits)
    assert patch.rows == [(lengths,) * 4 for lengths in patch.lengths]


@EVERY_FAMILY
def test_a_row_that_is_nan_spoils_no_other(kind):
    model = pumer.apply(tiny.model(kind), matrix.REDUCERS["smarttrim"], pack=True)
    inputs = tiny.batch(kind)
    expected = forward(model, inputs).logits
    inputs["pixel_values"][1] = float("nan")
    logits = forward(model, inputs).logits
    assert logits[1].isnan().all()
    close(logits, expected, [0, 2, 3])


@EVERY_FAMILY
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reducer", RAGGED.values(), ids=RAGGED)
def test_training_gives_the_same_gradients(kind, reducer, checkpointing):
    inputs, gradients = tiny.batch(kind), []
    for settings in ({}, {"pack": True}):
        model = pumer.apply(tiny.model(kind), reducer, **settings).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)  # of the decisions that a learned reducer draws
        logits = model(**inputs).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    padded, packed = gradients
    assert padded.keys() == packed.keys()
    for name, gradient in padded.items():
        if gradient is not None:
            torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_dropout_is_finite(kind):
    model = tiny.model(kind, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    inputs = tiny.batch(kind)
    pumer.apply(model, matrix.REDUCERS["dymu"], pack=True)
    model(**inputs).logits.sum().backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert not torch.equal(forward(model, inputs).logits, forward(model, inputs).logits)


@EVERY_FAMILY
@pytest.mark.parametrize("name", ["smarttrim", "energy"])
def test_flops_are_the_mean_over_the_rows(kind, name):
    model, inputs = (
        pumer.apply(tiny.model(kind), matrix.REDUCERS[name], pack=True),
        tiny.batch(kind),
    )
    forward(model, inputs)
    together, rows = last_forward_parts(model), pumer.active(model).rows
    alone = []
    for row in range(4):
        forward(model, tiny.alone(inputs, row))
        assert [lengths for (lengths,) in pumer.active(model).rows] == [x[row] for x in rows]
        alone.append(last_forward_parts(model))
    for part in ("attention", "mlp"):
        assert together[part] == pytest.approx(sum(each[part] for each in alone) / 4, abs=1)
    pumer.apply(model, matrix.REDUCERS[name])
    forward(model, inputs)
    assert together["mlp"] < last_forward_parts(model)["mlp"]


@EVERY_FAMILY
@pytest.mark.parametrize("name", ["pumer", "smarttrim", "dymu"])
def test_the_host_reads_the_lengths_alone(monkeypatch, kind, name):
    model = pumer.apply(tiny.model(kind), matrix.REDUCERS[name], pack=True)
    reads = []

    def counted(mask_BN, text):
        reads.append(mask_BN.shape)
        return packing.count(mask_BN, text)

    monkeypatch.setattr(encoder, "count", counted)
    # METER's entry reads a number to trim the text, in a way that is seen here.
    monkeypatch.setattr(meter, "max_length", lambda mask_BN: 9)
    with NoWaiting(), pumer.trace(model) as steps:
        forward(model, tiny.batch(kind))
    assert len(reads) == 1 + len(steps)


@EVERY_FAMILY
def test_packing_is_saved_and_comes_back(tmp_path, kind):
    model = pumer.apply(tiny.model(kind), matrix.REDUCERS["pumer"], pack=True)
    with pumer.reduced(model, "tome"):
        assert not pumer.active(model).pack
    assert pumer.active(model).pack
    pumer.save(model, tmp_path / "model")
    loaded = pumer.load(tmp_path / "model")
    assert pumer.active(loaded).pack
    inputs = tiny.batch(kind)
    assert torch.equal(forward(loaded, inputs).logits, forward(model, inputs).logits)


def test_what_cannot_be_packed_is_refused():
    model = tiny.model()
    for settings, message in (
        ({"reducer": "pumer", "trim": False}, "trim=False is to avoid"),
        ({"reducer": matrix.OFFICIAL}, "counts padding"),
    ):
        with pytest.raises(ValueError, match=message):
            pumer.apply(model, pack=True, **settings)
    assert pumer.active(model) is None
    pumer.apply(model, "pumer", pack=True)
    with pytest.raises(ValueError, match="without pack=True, or leave out output_attentions"):
        model(**tiny.batch(), output_attentions=True)


def test_a_family_that_does_not_pack_says_so():
    import tiny_llm

    for model in (tiny_llm.model("llava"), tiny.model(tiny.FAMILIES["BridgeTower"])):
        with pytest.raises(ValueError, match="cannot pack the rows of a batch"):
            pumer.apply(model, "pumer", pack=True)


@pytest.mark.slow
def test_a_compiled_graph_does_not_pack():
    model = pumer.apply(tiny.model(), matrix.REDUCERS["tome"], pack=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="packed rows have no length"):
        forward(compiled, tiny.batch())
