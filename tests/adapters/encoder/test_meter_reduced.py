"""Reduction in METER's fusion layers and its vision tower: against the model itself, masks, and
slow loops."""

import matrix
import pytest
import slow
import tiny
import torch

import pumer
from pumer import Compose, NoVision, Pool, PuMer, Random, ToMe
from pumer.adapters.encoder import reduce as encoder
from pumer.lab.bench.memory import peak_activations
from pumer.models.meter import MeterForImagesAndTextClassification
from pumer.reducers import EMBEDDINGS

ORDERS = pytest.mark.parametrize("update", ["parallel", "sequential"])
ANSWERING = "MeterForQuestionAnswering"
REDUCERS = matrix.REDUCERS | matrix.COMPOSED
EVERY_REDUCER = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
OTHER_SIZE = (64, 112)


def forward(model, inputs, **settings):
    with torch.no_grad():
        return model(**inputs, **settings)


def close(one, other, where=..., tolerance=1e-5):
    torch.testing.assert_close(one[where], other[where], rtol=0, atol=tolerance)


def bias(mask):
    return torch.zeros(mask.shape).masked_fill(~mask.bool(), -torch.inf)


# --- ratio 0 ---


@ORDERS
@pytest.mark.parametrize("size", [(96, 96), OTHER_SIZE])
@pytest.mark.parametrize("kind", tiny.METER)
def test_ratio_0_is_the_model_in_either_order_and_at_another_size(kind, size, update):
    model, inputs = tiny.model(kind, update=update), tiny.batch(kind, size=size)
    stock = tiny.logits(model, inputs)
    where = inputs["attention_mask"].bool() if stock.ndim == 3 else ...
    nothing = PuMer(prune=0, merge=0, merge_text=0, layers=(1, 2))
    for reducer in (nothing, Compose(ToMe(r=0, depth=tiny.TOWER), nothing)):
        with pumer.reduced(model, reducer):
            close(tiny.logits(model, inputs), stock, where)


def test_ratio_0_gives_the_states_of_every_layer():
    model, inputs = tiny.model("MeterModel"), tiny.batch(ANSWERING)
    stock = forward(model, inputs, output_hidden_states=True)
    words = inputs["attention_mask"].bool()
    with pumer.reduced(model, PuMer(prune=0, merge=0, merge_text=0, layers=(1,))):
        ours = forward(model, inputs, output_hidden_states=True)
    assert list(ours) == list(stock)
    close(ours.text_states, stock.text_states, words)
    close(ours.image_states, stock.image_states)
    assert len(ours.text_hidden_states) == len(stock.text_hidden_states) == tiny.LAYERS + 1
    for one, other in zip(ours.text_hidden_states, stock.text_hidden_states, strict=True):
        close(one, other, words)
    for one, other in zip(ours.image_hidden_states, stock.image_hidden_states, strict=True):
        close(one, other)


# --- dropping is masking ---


@ORDERS
@pytest.mark.parametrize(
    "name", [name for name in matrix.PRUNING if name not in ("no-vision", "vtw", "dynamicvit")]
)
def test_dropping_a_token_is_masking_it_from_there_on(name, update):
    """In the middle of a layer; for what leaves after one see
    `test_training_leaves_out_what_using_drops`."""
    model, inputs = tiny.model("MeterModel", update=update), tiny.batch(ANSWERING, padding=0)
    with pumer.reduced(model, matrix.PRUNING[name]), pumer.trace(model) as steps:
        dropping = forward(model, inputs).pooler_output
    plan, dropped = None, {}
    for step in steps:
        plan = step.plan if plan is None else plan.then(step.plan)
        dropped[step.layer] = plan.slot_BN < 0
    assert plan.slot_BN[:, 9:].lt(0).any()

    def mask(number, attended, text, image, text_bias, image_bias, *probes):
        hidden = dropped.get(number, torch.zeros(4, 9 + image.shape[1], dtype=torch.bool))
        words, patches = hidden[:, :9], hidden[:, 9:]
        return (
            attended,
            text,
            image,
            text_bias.masked_fill(words, -torch.inf),
            image_bias.masked_fill(patches, -torch.inf),
        )

    with torch.no_grad():
        text, words = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        image = model.encode_image(inputs["pixel_values"])
        text, image = (
            text + model.modality_embeddings.weight[0],
            image + model.modality_embeddings.weight[1],
        )
        image_bias = torch.zeros(image.shape[:2]).masked_fill(
            dropped.get(EMBEDDINGS, torch.zeros(4, 46, dtype=torch.bool))[:, 9:], -torch.inf
        )
        close(dropping, slow.fuse(model, text, image, bias(words), image_bias, mask))
    assert (dropping - forward(model, inputs).pooler_output).abs().max() > 1e-3


@ORDERS
def test_without_vision_the_text_looks_at_nothing(update):
    model, inputs = tiny.model("MeterModel", update=update), tiny.batch(ANSWERING)
    with pumer.reduced(model, NoVision()):
        found = forward(model, inputs).pooler_output
        other = inputs | {"pixel_values": torch.randn(4, 3, 96, 96)}
        assert torch.equal(forward(model, other).pooler_output, found)
    with torch.no_grad():
        text, words = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        text, nothing = text + model.modality_embeddings.weight[0], torch.zeros(4, 0, 32)
        close(found, slow.fuse(model, text, nothing, bias(words), torch.zeros(4, 0)))


# --- merging ---


@ORDERS
@pytest.mark.parametrize("proportional", [True, False])
def test_tower_and_fusion_are_reduced_as_the_papers_say(update, proportional):
    model, inputs = tiny.model("MeterModel", update=update), tiny.batch(ANSWERING)
    tower = ToMe(r=(6, -0.5), depth=tiny.TOWER, proportional=proportional)
    inside = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 2))
    with pumer.reduced(model, Compose(tower, inside)):
        pooled = forward(model, inputs).pooler_output
        _, image = pumer.active(model).lengths[-1]
    for row in range(len(pooled)):
        with torch.no_grad():
            expected, sizes = slow.meter(model, tiny.alone(inputs, row), tower, inside)
        assert len(sizes) == image
        close(pooled[row], expected, tolerance=5e-5)


@EVERY_REDUCER
def test_sizes_go_from_the_tower_into_fusion_and_none_is_lost(monkeypatch, reducer):
    choose, axes = encoder.choose, []

    def watched(reducer, layer, states, axis, *probes, **settings):
        after, plan, counts = choose(reducer, layer, states, axis, *probes, **settings)
        axes.append((axis, after, plan))
        return after, plan, counts

    monkeypatch.setattr(encoder, "choose", watched)
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING, padding=0, rows=1)
    with pumer.reduced(model, reducer):
        forward(model, inputs)
    for before, after, plan in axes:
        kept = before.sizes_BN if plan is None else before.sizes_BN * (plan.slot_BN >= 0)
        assert after.sizes_BN.sum() == kept.sum()
        assert after.sizes_BN[:, : after.text].sum() == kept[:, : before.text].sum()
    if not axes:  # a reducer that acts nowhere
        assert reducer.layers == ()
        return
    tower = [after for before, after, _ in axes if before.text == 0]
    start = axes[len(tower)][0]
    assert start.sizes_BN[:, :9].eq(1).all()
    expected = tower[-1].sizes_BN if tower else torch.ones(1, 37)
    assert torch.equal(start.sizes_BN[:, 9:], expected)
    assert not tower or expected.shape[1] < 37


@EVERY_REDUCER
def test_both_cls_stay_first_and_alone(reducer):
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING)
    with pumer.reduced(model, reducer), pumer.trace(model) as steps:
        forward(model, inputs)
        lengths = pumer.active(model).lengths
    assert steps or reducer.name == "none"
    for step in () if reducer.traits.drops_image else steps:
        text = lengths[step.layer + 1][0]
        for token, slot in ((0, 0), (step.text, text)):
            assert (step.plan.slot_BN[:, token] == slot).all()
            assert (step.plan.sources()[:, slot].sum(1) == 1).all()


# --- what comes out ---


@pytest.mark.parametrize("name", ["pumer", "tome", "random", "pool", "tome+pumer"])
def test_what_has_a_token_axis_comes_back_in_the_original_length(name):
    inputs = tiny.batch(ANSWERING)
    model = tiny.model("MeterModel")
    stock = forward(model, inputs, output_hidden_states=True)
    with pumer.reduced(model, REDUCERS[name]), pumer.trace(model) as steps:
        ours = forward(model, inputs, output_hidden_states=True)
        assert sum(pumer.active(model).lengths[-1]) < 12 + 37
    plan = steps[0].plan
    for step in steps[1:]:
        plan = plan.then(step.plan)
    for part in ("text", "image"):
        assert ours[f"{part}_states"].shape == stock[f"{part}_states"].shape
        for one, other in zip(
            ours[f"{part}_hidden_states"], stock[f"{part}_hidden_states"], strict=True
        ):
            assert one.shape == other.shape
    # Tokens of one slot have one state, dropped ones none.
    states = torch.cat([ours.text_states, ours.image_states], 1)
    together = plan.slot_BN[:, :, None] == plan.slot_BN[:, None]
    assert (states[plan.slot_BN < 0] == 0).all()
    assert ((states[:, :, None] - states[:, None]).abs().amax(-1)[together] == 0).all()

    model = tiny.model("MeterForMaskedLM")
    with pumer.reduced(model, REDUCERS[name]):
        logits = tiny.logits(model, inputs)
    assert logits.shape == (4, 12, 50)
    assert logits.isfinite().all()


def test_hidden_states_leave_through_the_head():
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING)
    assert [
        states.shape for states in forward(model, inputs, output_hidden_states=True).hidden_states
    ] == [(4, 49, 32)] * 5
    with pumer.reduced(model, REDUCERS["tome+pumer"], trim=False):
        assert [
            states.shape
            for states in forward(model, inputs, output_hidden_states=True).hidden_states
        ] == [(4, 49, 32)] * 5


@pytest.mark.parametrize("name", ["none", "pumer", "tome+pumer", "random"])
def test_the_three_parts_by_hand_are_the_forward(name):
    model, inputs = tiny.model("MeterModel"), tiny.batch(ANSWERING)
    with pumer.reduced(model, REDUCERS[name]), torch.no_grad():
        expected = model(**inputs).pooler_output
        text, words = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        image = model.encode_image(inputs["pixel_values"], inputs["pixel_mask"])
        assert torch.equal(model.fuse(text, words, image).pooler_output, expected)
        # Each text with each picture, as whoever ranks them does it.
        rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
        pairs = model.fuse(text[rows], words[rows], image[columns]).pooler_output
        close(pairs[rows == columns], expected)
        given = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        assert model(**(inputs | given | {"input_ids": None})).pooler_output.isfinite().all()


@pytest.mark.parametrize("name", [None, "none", "pumer", "tome+pumer", "uniform+random"])
@pytest.mark.parametrize("kind", ["MeterModel", "MeterForImageAndTextRetrieval"])
def test_several_texts_to_a_picture_are_as_many_pairs(kind, name):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    if name is not None:
        pumer.apply(model, REDUCERS[name])
    pictures = {key: inputs.pop(key)[:2] for key in ("pixel_values", "pixel_mask")}
    repeated = {key: value.repeat_interleave(2, 0) for key, value in pictures.items()}
    close(
        tiny.logits(model, inputs | pictures | {"texts_per_image": 2}),
        tiny.logits(model, inputs | repeated),
    )
    with pytest.raises(
        ValueError, match="4 texts and 2 images and texts_per_image 3: the batch sizes must agree"
    ):
        model(**inputs, **pictures, texts_per_image=3)


@pytest.mark.parametrize(
    "reducer",
    [REDUCERS["pumer"], *matrix.COMPOSED.values(), matrix.OFFICIAL],
    ids=["pumer", *matrix.COMPOSED, "official"],
)
def test_a_saved_reduction_comes_back(tmp_path, reducer):
    model, inputs = tiny.model(ANSWERING, update="sequential"), tiny.batch(ANSWERING)
    pumer.apply(model, reducer, attention="eager", trim=False)
    pumer.save(model, tmp_path / "model")
    loaded = pumer.load(tmp_path / "model")
    patch = pumer.active(loaded)
    assert (patch.reducer, patch.attention, patch.trim) == (
        pumer.active(model).reducer,
        "eager",
        False,
    )
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


def test_a_subclass_is_reduced_like_its_class():
    class Mine(MeterForImagesAndTextClassification):
        pass

    kind = "MeterForImagesAndTextClassification"
    model, inputs = tiny.model(kind), tiny.batch(kind)
    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    for each in (model, mine):
        pumer.apply(each, matrix.REDUCERS["pumer"])
    assert torch.equal(tiny.logits(mine, inputs), tiny.logits(model, inputs))
    assert pumer.active(mine).lengths == pumer.active(model).lengths
    assert pumer.report(mine).macs == pumer.report(model).macs


# --- what cannot be ---


@pytest.fixture(scope="module")
def answering():
    return tiny.model(ANSWERING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
        (
            {"inputs_embeds": torch.ones(4, 12, 24)},
            "give exactly one of input_ids and inputs_embeds",
        ),
        ({"pixel_values": None}, "give pixel_values: METER needs an image"),
        (
            {"input_ids": torch.ones(3, 12).long(), "attention_mask": None},
            "3 texts and 4 images: the batch sizes must agree",
        ),
        (
            {"pixel_values": torch.ones(2, 3, 96, 96)},
            "4 texts and 2 images: the batch sizes must agree",
        ),
    ],
)
@pytest.mark.parametrize("reducer", [None, "pumer", "tome+pumer"])
def test_inputs_are_checked(answering, reducer, changes, message):
    inputs = tiny.batch(ANSWERING) | changes
    if reducer is None:
        with pytest.raises(ValueError, match=message):
            answering(**inputs)
    else:
        with pumer.reduced(answering, REDUCERS[reducer]), pytest.raises(ValueError, match=message):
            answering(**inputs)


@pytest.mark.parametrize("reducer", ["none", "tome+pumer"])
def test_padded_pictures_are_refused(answering, reducer):
    inputs = tiny.batch(ANSWERING)
    inputs["pixel_mask"][1, 80:] = 0
    with pytest.raises(RuntimeError, match="METER takes images of one size"):
        answering(**inputs)
    with (
        pumer.reduced(answering, REDUCERS[reducer]),
        pytest.raises(RuntimeError, match="images of one size"),
    ):
        answering(**inputs)


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (PuMer(layers=(2, 5, 8)), r"reduces in layers \[5, 8\], but the model has layers 0 to 3"),
        (
            Compose(ToMe(r=1, depth=12), Random()),
            r"tome reduces in layers \[3, 4, .*, 11\], but the model has layers 0 to 2",
        ),
        (
            Compose(ToMe(r=1, depth=3), PuMer(layers=(2, 5, 8))),
            r"pumer reduces in layers \[5, 8\], but the model has layers 0 to 3",
        ),
        (Compose(Random(), Random()), "random in the tower reduces in layers 0 to 2"),
        (PuMer(official=True, layers="all"), "published reducer needs `layers`"),
        (
            Compose(ToMe(r=1, depth=3), PuMer(official=True, layers="all")),
            "published reducer needs `layers`",
        ),
        (
            pumer.DynamicViT(keep=0.02, layers=(0,), official=True),
            "leaves no image token after layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(answering, reducer, message):
    with pytest.raises(ValueError, match=message):
        pumer.apply(answering, reducer)
    assert pumer.active(answering) is None


def test_a_composition_needs_a_tower_and_two_single_reducers():
    with pytest.raises(
        ValueError, match="ViltForQuestionAnswering has no vision tower that can be reduced"
    ):
        pumer.apply(tiny.model(), matrix.COMPOSED["tome+pumer"])
    for make, message in (
        (
            lambda: Compose(tower=PuMer(), inside=PuMer()),
            "a vision tower has none: give tower=ToMe",
        ),
        (lambda: Compose(tower=ToMe(), inside=Compose()), "inside is itself a composition"),
        (lambda: Compose(tower="tome"), "tower is a reducer, not 'tome'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_pooling_after_the_tower_has_reduced_says_so(answering):
    with (
        pumer.reduced(answering, Compose(ToMe(r=2, depth=3), Pool())),
        pytest.raises(ValueError, match="pooling needs all patches"),
    ):
        answering(**tiny.batch(ANSWERING))


def test_presets_fit_the_published_model():
    vision = tiny.meter_config().vision_config.to_dict() | {
        "num_hidden_layers": 11,
        "image_size": 384,
    }
    model = tiny.model(ANSWERING, num_hidden_layers=6, vision_config=vision)
    inputs = tiny.batch(ANSWERING, size=(384, 384), rows=1)
    for name in (
        "meter-vqav2",
        "meter-nlvr2",
        "meter-snli-ve",
        "meter-retrieval",
        "meter-vqav2-tower",
        "meter-vqav2-even",
    ):
        with pumer.reduced(model, name):
            forward(model, inputs)
            assert pumer.report(model).active
            assert pumer.report(model).ratio > 1.2


def test_reducing_in_the_tower_saves_memory_too():
    vision = tiny.meter_config().vision_config.to_dict() | {"intermediate_size": 192}
    model, inputs = tiny.model(ANSWERING, vision_config=vision), tiny.batch(ANSWERING)
    stock = peak_activations(lambda: tiny.logits(model, inputs))
    with pumer.reduced(model, Compose(ToMe(r=6, depth=tiny.TOWER), pumer.Unreduced())):
        assert peak_activations(lambda: tiny.logits(model, inputs)) < stock


def test_official_is_that_of_meter(answering):
    with pumer.reduced(answering, matrix.OFFICIAL):
        assert pumer.active(answering).reducer.official == "meter"
    with pumer.reduced(answering, Compose(ToMe(r=1, depth=3), matrix.OFFICIAL)):
        assert pumer.active(answering).reducer.inside.official == "meter"
