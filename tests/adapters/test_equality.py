"""What has to be equal to what: at ratio 0, alone and in a batch, with either attention kernel,
dropped and masked."""

import copy

import matrix
import pytest
import tiny
import torch

import halves
import pumer
from pumer.reducers import Plan

TOLERANCE = 1e-5
EVERY_REDUCER = pytest.mark.parametrize(
    ("answering", "reducer"), matrix.on_every_family(), indirect=["answering"]
)
WITH_OFFICIAL = pytest.mark.parametrize(
    ("answering", "reducer"),
    matrix.on_every_family(official=matrix.OFFICIAL),
    indirect=["answering"],
)
EVERY_CLASS = pytest.mark.parametrize("kind", tiny.CLASSES)
EVERY_FAMILY = pytest.mark.parametrize("kind", tiny.FAMILIES.values(), ids=tiny.FAMILIES)


@pytest.fixture(scope="module", params=tiny.FAMILIES.values(), ids=tiny.FAMILIES)
def answering(request):
    """A model that no test leaves changed."""
    return tiny.model(request.param)


@pytest.fixture
def inputs(answering):
    """A padded batch for it."""
    return tiny.batch(type(answering).__name__)


@pytest.fixture
def in_order(monkeypatch):
    """Makes the stock embedding draw its patches in raster order, which it does at random
    otherwise."""
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda weights, count, **_: torch.arange(int(count)).clamp_max(len(weights) - 1),
    )


def forward(model, inputs, **settings):
    with torch.no_grad():
        return model(**inputs, **settings)


def real(inputs, length):
    """Bool [B,length] of a stock model's real tokens, text first."""
    rows, text = inputs["input_ids"].shape
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, :text] = inputs["attention_mask"].bool()
    for row, (high, wide) in enumerate(tiny.PICTURES):
        mask[row, text : text + 1 + high * wide // tiny.PATCH**2] = True
    return mask


def close(one, other, where=...):
    torch.testing.assert_close(one[where], other[where], rtol=0, atol=TOLERANCE)


def test_the_matrix_has_every_reducer():
    assert not matrix.missing()


# --- ratio 0 is the stock model ---


@EVERY_CLASS
@pytest.mark.parametrize(
    "name", halves.sweep(matrix.IDENTITIES, ("none", "pumer", "tome", "uniform"))
)
def test_ratio_0_is_the_stock_model(kind, name):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    stock = tiny.answer(forward(model, inputs))
    # Padded tokens come back empty: nobody may read them.
    where = inputs["attention_mask"].bool() if stock.ndim == 3 else ...
    with pumer.reduced(model, matrix.IDENTITIES[name]):
        close(tiny.answer(forward(model, inputs)), stock, where)


@pytest.mark.parametrize("reducer", matrix.IDENTITIES.values(), ids=matrix.IDENTITIES)
def test_ratio_0_gives_the_stock_states_and_attention(in_order, reducer):
    model, inputs = tiny.model("ViltModel"), tiny.batch()
    stock = forward(model, inputs, output_hidden_states=True, output_attentions=True)
    with pumer.reduced(model, reducer):
        ours = forward(model, inputs, output_hidden_states=True, output_attentions=True)
    mask = real(inputs, stock.last_hidden_state.shape[1])
    assert list(ours) == list(stock)
    close(ours.last_hidden_state, stock.last_hidden_state, mask)
    assert len(ours.hidden_states) == len(stock.hidden_states) == tiny.LAYERS + 1
    for one, other in zip(ours.hidden_states, stock.hidden_states, strict=True):
        close(one, other, mask)
    for one, other in zip(ours.attentions, stock.attentions, strict=True):
        for head in range(4):
            close(one[:, head], other[:, head], mask)


@pytest.mark.parametrize(
    "kind", ["ViltModel", "ViltForQuestionAnswering", "ViltForTokenClassification"]
)
def test_tuples_come_back_in_the_stock_order(in_order, kind):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    settings = {"return_dict": False, "output_hidden_states": True}
    stock = forward(model, inputs, **settings)
    with pumer.reduced(model, pumer.Unreduced()):
        ours = forward(model, inputs, **settings)
    assert [type(part) for part in ours] == [type(part) for part in stock]
    assert len(ours[-1]) == len(stock[-1]) == tiny.LAYERS + 1


def test_embeddings_may_be_given(in_order):
    model, inputs = tiny.model("ViltModel"), tiny.batch()
    embeddings = model.embeddings
    with torch.no_grad():
        image_embeds, image_mask, _ = embeddings.visual_embed(
            inputs["pixel_values"], inputs["pixel_mask"], -1
        )
        given = {
            "inputs_embeds": embeddings.text_embeddings.word_embeddings(inputs["input_ids"]),
            "attention_mask": inputs["attention_mask"],
            "image_embeds": image_embeds,
            "pixel_mask": image_mask,
        }
    stock = forward(model, given)
    with pumer.reduced(model, pumer.Unreduced()):
        close(forward(model, given).pooler_output, stock.pooler_output)
        close(forward(model, inputs).pooler_output, stock.pooler_output)
        del given["pixel_mask"]
        assert forward(model, given).pooler_output.isfinite().all()


# --- padding and attention kernels change nothing ---


@EVERY_REDUCER
def test_a_row_of_a_batch_equals_the_sample_alone(answering, inputs, reducer):
    with pumer.reduced(answering, reducer):
        together = forward(answering, inputs).logits
        for row in range(len(together)):
            close(forward(answering, tiny.alone(inputs, row)).logits[0], together[row])


@EVERY_CLASS
def test_a_row_of_a_batch_equals_the_sample_alone_in_every_class(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    with pumer.reduced(model, matrix.REDUCERS["pumer"]):
        together = tiny.answer(forward(model, inputs))
        for row in range(len(together)):
            one = tiny.answer(forward(model, tiny.alone(inputs, row)))[0]
            close(one, together[row, : len(one)] if one.ndim == 2 else together[row])


@EVERY_REDUCER
def test_eager_equals_sdpa_and_trimming_changes_nothing(answering, inputs, reducer):
    logits, lengths, entries = [], [], []
    for attention, trim in (("sdpa", True), ("eager", True), ("sdpa", False)):
        with pumer.reduced(answering, reducer, attention=attention, trim=trim):
            logits.append(forward(answering, inputs).logits)
            lengths.append(pumer.active(answering).lengths)
            entries.append(pumer.active(answering).entry)
            assert pumer.report(answering).active
    close(logits[0], logits[1])
    close(logits[0], logits[2])
    assert lengths[0] == lengths[1]
    assert entries[2] in ((12, 49, (6, 8)), (12, 37, (6, 6)))
    assert lengths[0][0][0] == 9, "the text was not cut to the longest of the batch"


def test_the_published_mode_is_given_all_padded_text(answering, inputs):
    """The published code counts padded text and lets it vote: cutting it would change the published
    results."""
    with pumer.reduced(answering, matrix.OFFICIAL):
        trimmed = forward(answering, inputs).logits
        assert pumer.active(answering).lengths[0][0] == 12
    with pumer.reduced(answering, matrix.OFFICIAL, attention="eager"):
        close(forward(answering, inputs).logits, trimmed)


@pytest.mark.parametrize("name", ["pumer", "tome", "random", "pool"])
@pytest.mark.parametrize("kind", tiny.PER_TOKEN)
def test_what_has_a_token_axis_comes_back_in_the_original_length(in_order, kind, name):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    stock = forward(model, inputs, output_hidden_states=True)
    with pumer.reduced(model, matrix.REDUCERS[name]):
        ours = forward(model, inputs, output_hidden_states=True)
        assert sum(pumer.active(model).lengths[-1]) < stock.hidden_states[0].shape[1]
    for one, other in zip(ours.hidden_states, stock.hidden_states, strict=True):
        assert one.shape == other.shape
    if kind == "ViltModel":
        assert ours.last_hidden_state.shape == stock.last_hidden_state.shape
    else:
        assert ours.logits.shape == stock.logits.shape
        mask = inputs["attention_mask"].bool()
        assert ours.logits[mask].isfinite().all()
        assert ours.logits[mask].abs().amin() > 0


# --- dropping a token is masking it ---


def drop_in_stock(model, dropped):
    """Hooks that mask, in every stock layer, the tokens that were dropped before its attention.

    Args:
        dropped: for each layer, bool [B,N] of the tokens that its attention may no longer see.
    """

    def hook(module, args):
        states, mask, *rest = args
        hidden = dropped[layers.index(module)][:, None, None]
        return states, mask.masked_fill(hidden, torch.finfo(mask.dtype).min), *rest

    layers = list(model.vilt.encoder.layer)
    return [layer.register_forward_pre_hook(hook) for layer in layers]


@pytest.mark.parametrize("reducer", matrix.PRUNING.values(), ids=matrix.PRUNING)
def test_dropping_a_token_equals_masking_it_in_the_stock_model(in_order, reducer):
    # The longest text fills the batch, so that the reduced model's token axis is the stock one's.
    model, inputs = tiny.model(), tiny.batch(padding=0)
    with pumer.reduced(model, reducer), pumer.trace(model) as steps:
        dropping = forward(model, inputs).logits

    dropped, plan = [], None
    at = {step.layer: step.plan for step in steps}
    for layer in range(tiny.LAYERS):
        if layer - 1 in at:
            plan = at[layer - 1] if plan is None else plan.then(at[layer - 1])
        mask = plan.slot_BN < 0 if plan is not None else torch.zeros(4, 35, dtype=torch.bool)
        dropped.append(mask)
    assert dropped[-1].any()
    hooks = drop_in_stock(model, dropped)
    try:
        masking = forward(model, inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    close(dropping, masking)
    assert (dropping - forward(model, inputs).logits).abs().max() > 1e-3


# --- merging ---


def test_merging_twins_changes_nothing_when_sizes_count(in_order):
    """Equal tokens stay equal through all layers: two of them, or one that counts twice, is the
    same."""
    model, inputs = tiny.model(), tiny.batch()
    twins = torch.randn(4, 6, 32).repeat_interleave(2, 1)
    image = {
        "image_embeds": torch.cat([torch.randn(4, 1, 32), twins], 1),
        "pixel_mask": torch.ones(4, 13),
    }
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **image}
    stock = tiny.logits(model, inputs)
    for reducer, same in (
        (pumer.ToMe(r=(6,)), True),
        (pumer.ToMe(r=(6,), proportional=False), False),
    ):
        with pumer.reduced(model, reducer):
            found = tiny.logits(model, inputs)
            assert pumer.active(model).lengths[-1] == (9, 7)
        assert torch.allclose(found, stock, rtol=0, atol=TOLERANCE) == same


@pytest.mark.parametrize(
    ("answering", "reducer"),
    [
        case
        for case in matrix.on_every_family()
        if case.id.split("-", 1)[1] in ("pumer", "tome", "tome+pumer")
    ],
    indirect=["answering"],
)
def test_every_source_token_counts_the_same_however_often_it_was_merged(answering, inputs, reducer):
    with pumer.reduced(answering, reducer), pumer.trace(answering) as steps:
        tiny.logits(answering, inputs)
    plan = steps[0].plan
    for step in steps[1:]:
        plan = plan.then(step.plan)
    sizes = plan.total(torch.ones_like(plan.weight_BN))
    real = (plan.slot_BN >= 0) & plan.mask_BK.gather(1, plan.slot_BN.clamp_min(0))
    assert sizes.max() > 2
    close(plan.weight_BN, 1 / sizes.gather(1, plan.slot_BN.clamp_min(0)), real)


# --- a model with a patch is still one model among others ---


def everything(model):
    """All attributes of all modules, by identity, and all weights."""
    attributes = {
        name: {key: id(value) for key, value in vars(part).items()}
        for name, part in model.named_modules()
    }
    settings = {name: str(part.extra_repr()) for name, part in model.named_modules()}
    return (
        attributes,
        settings,
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


@WITH_OFFICIAL
def test_remove_leaves_no_trace(answering, inputs, reducer):
    inputs = tiny.alone(inputs, 2)
    before, logits = everything(answering), forward(answering, inputs).logits
    pumer.apply(answering, reducer)
    forward(answering, inputs)
    pumer.remove(answering)
    after = everything(answering)
    assert after[:2] == before[:2]
    for name, tensor in before[2].items():
        assert torch.equal(after[2][name], tensor)
    # The stock embedding draws its patches anew: their order decides the last bits.
    close(forward(answering, inputs).logits, logits)


def test_remove_is_exact_to_the_bit(in_order, answering, inputs):
    logits = forward(answering, inputs).logits
    with pumer.reduced(answering, matrix.OFFICIAL):
        assert not torch.equal(forward(answering, inputs).logits, logits)
    assert torch.equal(forward(answering, inputs).logits, logits)


@EVERY_FAMILY
def test_two_models_side_by_side(kind):
    one, other, stock = tiny.model(kind), tiny.model(kind), tiny.model(kind)
    inputs, expected = tiny.batch(kind), []
    for reducer in (matrix.REDUCERS["pumer"], matrix.REDUCERS["tome"]):
        with pumer.reduced(stock, reducer):
            expected.append(forward(stock, inputs).logits)
    pumer.apply(one, matrix.REDUCERS["pumer"])
    pumer.apply(other, matrix.REDUCERS["tome"])
    for _ in range(2):
        assert torch.equal(forward(one, inputs).logits, expected[0])
        assert torch.equal(forward(other, inputs).logits, expected[1])
    pumer.remove(one)
    assert torch.equal(forward(other, inputs).logits, expected[1])


def test_reduced_nests(answering, inputs):
    assert pumer.active(answering) is None
    with pumer.reduced(answering, matrix.REDUCERS["pumer"], attention="eager", trim=False):
        outer = forward(answering, inputs).logits
        with pumer.reduced(answering, matrix.REDUCERS["tome"]):
            assert pumer.active(answering).reducer == matrix.REDUCERS["tome"]
        patch = pumer.active(answering)
        assert (patch.reducer, patch.attention, patch.trim) == (
            matrix.REDUCERS["pumer"],
            "eager",
            False,
        )
        assert torch.equal(forward(answering, inputs).logits, outer)
    assert pumer.active(answering) is None


def test_reduced_cleans_up_after_an_error(answering):
    with pytest.raises(KeyError), pumer.reduced(answering, matrix.REDUCERS["pumer"]):
        raise KeyError
    assert pumer.active(answering) is None


@EVERY_FAMILY
def test_a_copy_of_a_reduced_model_is_its_own_model(kind):
    model, inputs = pumer.apply(tiny.model(kind), matrix.REDUCERS["pumer"]), tiny.batch(kind)
    logits = forward(model, inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(forward(twin, inputs).logits, logits)
    assert pumer.active(twin).lengths[-1] != pumer.active(twin).lengths[0]
    pumer.remove(model)
    assert torch.equal(forward(twin, inputs).logits, logits)
    pumer.remove(twin)
    assert pumer.active(twin) is None
    close(forward(twin, inputs).logits, forward(tiny.model(kind), inputs).logits)
    assert all("forward" not in vars(part) for part in twin.modules())


def test_plans_of_a_forward_are_those_of_its_lengths(answering, inputs):
    with pumer.reduced(answering, matrix.REDUCERS["pumer"]), pumer.trace(answering) as steps:
        forward(answering, inputs)
        lengths = pumer.active(answering).lengths
    assert [step.layer for step in steps] == [1, 2]
    for step in steps:
        assert isinstance(step.plan, Plan)
        assert step.plan.slots == sum(lengths[step.layer + 1])
