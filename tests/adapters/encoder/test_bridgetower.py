"""Reduction in BridgeTower's cross-modal layers and its image tower, against the stock model."""

import matrix
import pytest
import tiny
import torch

import pumer
from pumer import Compose, NoVision, PuMer, ToMe, Uniform
from pumer.reducers import EMBEDDINGS

ANSWERING = "BridgeTowerForQuestionAnswering"
REDUCERS = matrix.REDUCERS | matrix.COMPOSED
NOTHING = PuMer(prune=0, merge=0, merge_text=0, layers=(1, 2))
TEXT = 12
"""Text tokens of a batch, padding included."""


def forward(model, inputs, **settings):
    with torch.no_grad():
        return model(**inputs, **settings)


def close(one, other, where=..., tolerance=1e-5):
    torch.testing.assert_close(one[where], other[where], rtol=0, atol=tolerance)


# --- ratio 0 ---


@pytest.mark.parametrize("kind", tiny.BRIDGETOWER)
def test_ratio_0_in_both_places_is_the_stock_model(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    stock = tiny.logits(model, inputs)
    where = inputs["attention_mask"].bool() if stock.ndim == 3 else ...
    with pumer.reduced(model, Compose(ToMe(r=0, depth=tiny.TOWER), NOTHING)):
        close(tiny.logits(model, inputs), stock, where)


@pytest.mark.parametrize(
    "changes",
    [
        {"share_cross_modal_transformer_layers": False},
        {"link_tower_type": "scaled_add"},
        {"link_tower_type": "interpolate"},
    ],
    ids=str,
)
def test_every_kind_of_bridge(changes):
    model, inputs = tiny.model("BridgeTowerModel", **changes), tiny.batch(ANSWERING)
    stock = forward(model, inputs).pooler_output
    with pumer.reduced(model, NOTHING):
        close(forward(model, inputs).pooler_output, stock)
    with pumer.reduced(model, matrix.COMPOSED["tome+pumer"]):
        assert forward(model, inputs).pooler_output.isfinite().all()


@pytest.mark.parametrize("name", ["none", "tower"])
def test_ratio_0_gives_the_states_of_every_layer(name):
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING)
    stock = forward(model, inputs)
    words = inputs["attention_mask"].bool()
    tower = Compose(ToMe(r=0, depth=tiny.TOWER), NOTHING)
    with pumer.reduced(model, NOTHING if name == "none" else tower):
        ours = forward(model, inputs)
        in_a_tuple = forward(model, inputs, return_dict=False)
    close(ours.text_features, stock.text_features, words)
    close(ours.image_features, stock.image_features)
    assert len(in_a_tuple) == 4
    for part, expected in zip(ours.hidden_states, stock.hidden_states, strict=True):
        assert len(part) == len(expected)
    for one, other in zip(ours.hidden_states[0], stock.hidden_states[0], strict=True):
        close(one, other, words)
    for one, other in zip(ours.hidden_states[1], stock.hidden_states[1], strict=True):
        close(one, other)
    for one, other in zip(ours.hidden_states[2], stock.hidden_states[2], strict=True):
        close(one[0], other[0], words)
        close(one[1], other[1])


def test_embedded_patches_and_images_of_another_size():
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING, size=(64, 112))
    with pytest.raises(ValueError, match="Input image size"):
        forward(model, inputs)
    stock = forward(model, inputs, interpolate_pos_encoding=True).pooler_output
    with torch.no_grad():
        patches = model.vision_model.visual.forward_pre(
            inputs["pixel_values"], interpolate_pos_encoding=True
        ).transpose(0, 1)
    embedded = {"image_embeds": patches} | {
        name: inputs[name] for name in ("input_ids", "attention_mask")
    }
    with pumer.reduced(model, NOTHING):
        close(forward(model, inputs, interpolate_pos_encoding=True).pooler_output, stock)
        assert pumer.active(model).entry == (TEXT, 29, (4, 7))
        close(forward(model, embedded).pooler_output, stock)
        with pytest.raises(ValueError, match="Input image size"):
            forward(model, inputs)


# --- dropping is masking ---


def masking(model, steps, text, image):
    """Hooks that hide from the stock cross-modal layers what was dropped, and leave the rest be."""
    dropped, plan = {}, None
    for step in steps:
        plan = step.plan if plan is None else plan.then(step.plan)
        dropped[step.layer] = plan.slot_BN < 0

    def bias(layer, columns):
        """Of everything dropped up to this layer."""
        hidden = torch.zeros(4, text + image, dtype=torch.bool)
        for at, marks in dropped.items():
            hidden = hidden | marks if at <= layer else hidden
        minimum = torch.finfo(torch.float32).min
        return torch.zeros(hidden.shape).masked_fill(hidden, minimum)[:, None, None, columns]

    words, patches = slice(0, text), slice(text, None)
    handles = []
    for index in range(tiny.LAYERS):

        def of_text(module, args, kwargs, index=index):
            # Tokens leave after the text's attention.
            masks = {"attention_mask": words, "encoder_attention_mask": patches}
            return args, kwargs | {name: bias(index - 1, at) for name, at in masks.items()}

        def of_image(module, args, kwargs, index=index):
            masks = {"attention_mask": patches, "encoder_attention_mask": words}
            return args, kwargs | {name: bias(index, at) for name, at in masks.items()}

        for layers, hook in (
            (model.cross_modal_text_layers, of_text),
            (model.cross_modal_image_layers, of_image),
        ):
            handles.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
    return handles


@pytest.mark.parametrize(
    "name", [name for name in matrix.PRUNING if name not in ("no-vision", "vtw", "dynamicvit")]
)
def test_dropping_a_token_is_masking_it_from_there_on(name):
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING, padding=0)
    # All texts are as long, so that the masks have no padding besides.
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["input_ids"] = inputs["input_ids"].clamp_min(2)
    with pumer.reduced(model, matrix.PRUNING[name]), pumer.trace(model) as steps:
        dropping = forward(model, inputs)
    stock = forward(model, inputs)
    left = steps[0].plan
    for step in steps[1:]:
        left = left.then(step.plan)
    assert (left.slot_BN[:, 9:] < 0).any()
    handles = masking(model, steps, 9, 37)
    try:
        masked = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    close(dropping.pooler_output, masked.pooler_output)
    kept = left.slot_BN >= 0
    close(dropping.text_features, masked.text_features, kept[:, :9])
    close(dropping.image_features, masked.image_features, kept[:, 9:])
    assert (dropping.pooler_output - stock.pooler_output).abs().max() > 1e-3


def test_dropping_in_the_tower_is_masking_there_and_above():
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING, padding=0)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["input_ids"] = inputs["input_ids"].clamp_min(2)
    last = tiny.TOWER - 1
    reducer = Compose(Uniform(prune=0.4, layers=(last,)), Uniform(prune=0.3, layers=(1,)))
    with pumer.reduced(model, reducer), pumer.trace(model) as steps:
        dropping = forward(model, inputs).pooler_output
    assert [step.layer for step in steps] == [EMBEDDINGS, 1]
    dropped = steps[0].plan.slot_BN[:, 9:] < 0
    assert dropped.any()
    handles = masking(model, steps, 9, 37)
    for block in model.vision_model.visual.transformer.resblocks[tiny.TOWER :]:
        handles.append(block.register_forward_pre_hook(lambda module, args: (*args, dropped)))
    try:
        masked = forward(model, inputs).pooler_output
    finally:
        for handle in handles:
            handle.remove()
    close(dropping, masked)
    assert (dropping - forward(model, inputs).pooler_output).abs().max() > 1e-3


def test_without_vision_the_image_changes_nothing():
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING)
    with pumer.reduced(model, NoVision()):
        first = forward(model, inputs).pooler_output
        other = inputs | {"pixel_values": torch.randn(4, 3, 96, 96)}
        assert torch.equal(forward(model, other).pooler_output, first)


# --- merging ---


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("place", ["cross", "tower", "both"])
def test_merging_twins_changes_nothing_when_sizes_count(place, proportional):
    """Equal tokens stay equal in tower and cross-modal layers, and bridges add equal states."""
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING)
    twins = torch.randn(4, 6, 128).repeat_interleave(2, 1)
    inputs = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "image_embeds": torch.cat([torch.randn(4, 1, 128), twins], 1),
    }
    stock = forward(model, inputs).pooler_output
    cross = ToMe(r=(3 if place == "both" else 6,), proportional=proportional)
    tower = ToMe(r=(3 if place == "both" else 6,), proportional=proportional)
    inside = pumer.Unreduced() if place == "tower" else cross
    with pumer.reduced(model, cross if place == "cross" else Compose(tower, inside)):
        merged = forward(model, inputs).pooler_output
        assert pumer.active(model).lengths[-1] == (TEXT, 7)
    assert torch.allclose(merged, stock, rtol=0, atol=1e-5) == proportional


@pytest.mark.parametrize(
    "name", ["pumer", "tome", "random", "tome+pumer", "tome+tome", "uniform+random"]
)
def test_bridges_add_what_the_plans_leave_of_the_towers(name):
    """The towers' states, projected and then reduced by all plans so far."""
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING)
    added = {"text": [], "image": []}
    for stream, links in (
        ("text", model.cross_modal_text_link_tower),
        ("image", model.cross_modal_image_link_tower),
    ):
        for link in links:
            link.register_forward_pre_hook(
                lambda module, args, stream=stream: added[stream].append(args[0])
            )
    with pumer.reduced(model, REDUCERS[name]), pumer.trace(model) as steps:
        output = forward(model, inputs)
    texts, images, _ = output.hidden_states
    assert len(added["text"]) == len(added["image"]) == tiny.LAYERS - 1
    for bridge in range(1, tiny.LAYERS):
        depth = tiny.TOWER + bridge
        with torch.no_grad():
            text = model.cross_modal_text_transform(texts[depth])
            image = model.vision_model.visual.ln_post(images[depth].transpose(0, 1))
            image = model.cross_modal_image_transform(image)
            text_type, image_type = model.token_type_embeddings.weight
        states = torch.cat([text + text_type, image + image_type], 1)
        plan = None
        for step in steps:
            if step.layer < bridge:
                plan = step.plan if plan is None else plan.then(step.plan)
        expected = states if plan is None else plan.matrix() @ states
        real = torch.ones(expected.shape[:2]).bool() if plan is None else plan.mask_BK
        found = torch.cat([added["text"][bridge - 1], added["image"][bridge - 1]], 1)
        close(found, expected, real)


def test_the_tower_is_reduced_below_the_bridges_alone():
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING)
    with pumer.reduced(model, Compose(ToMe(r=4, depth=tiny.TOWER), pumer.Unreduced())):
        forward(model, inputs)
        patch = pumer.active(model)
        assert patch.tower == [37, 33, 29, 25]
        assert patch.lengths == [(9, 25)] * (tiny.LAYERS + 1)
        assert pumer.report(model).active
    with pytest.raises(ValueError, match=r"but the .* has layers 0 to 2"):
        pumer.apply(model, Compose(ToMe(r=1, depth=5), pumer.Unreduced()))


# --- what comes out ---


@pytest.mark.parametrize("name", ["pumer", "tome+pumer", "random"])
def test_states_come_back_in_the_original_length(name):
    model, inputs = tiny.model("BridgeTowerModel"), tiny.batch(ANSWERING)
    stock = forward(model, inputs)
    with pumer.reduced(model, REDUCERS[name]):
        ours = forward(model, inputs)
        assert sum(pumer.active(model).lengths[-1]) < TEXT + 37
    assert ours.text_features.shape == stock.text_features.shape
    assert ours.image_features.shape == stock.image_features.shape
    for part in (0, 1):
        for one, other in zip(ours.hidden_states[part], stock.hidden_states[part], strict=True):
            assert one.shape == other.shape
    for pair, other in zip(ours.hidden_states[2], stock.hidden_states[2], strict=True):
        assert [x.shape for x in pair] == [x.shape for x in other]
    contrastive = tiny.model("BridgeTowerForContrastiveLearning")
    loss = forward(contrastive, inputs, return_loss=True).loss
    with pumer.reduced(contrastive, REDUCERS[name]):
        reduced = forward(contrastive, inputs, return_loss=True)
    assert reduced.loss.isfinite()
    assert reduced.loss != loss


def test_hidden_states_leave_through_the_heads_if_asked_for():
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING)
    asked = {"output_hidden_states": True}
    assert forward(model, inputs).hidden_states is None
    shapes = [(4, TEXT + 37, 32)] * tiny.LAYERS
    assert [x.shape for x in forward(model, inputs, **asked).hidden_states] == shapes
    with pumer.reduced(model, REDUCERS["tome+pumer"], trim=False):
        assert [x.shape for x in forward(model, inputs, **asked).hidden_states] == shapes
        assert forward(model, inputs).hidden_states is None
    retrieval = tiny.model("BridgeTowerForImageAndTextRetrieval")
    with pumer.reduced(retrieval, REDUCERS["pumer"]):
        assert forward(retrieval, inputs).hidden_states is None
        assert len(forward(retrieval, inputs, **asked).hidden_states[2]) == tiny.LAYERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None, "inputs_embeds": torch.ones(4, 12, 32)}, "give input_ids"),
        ({"pixel_values": None}, "exactly one of pixel_values and image_embeds"),
        ({"image_embeds": torch.ones(4, 5, 128)}, "exactly one of pixel_values and image_embeds"),
        ({"pixel_values": torch.ones(2, 3, 96, 96)}, "4 texts and 2 images: the batch sizes"),
        ({"output_attentions": True}, "leave output_attentions out"),
    ],
)
@pytest.mark.parametrize("name", ["pumer", "tome+pumer"])
def test_inputs_are_checked(name, changes, message):
    model = tiny.model(ANSWERING)
    with pumer.reduced(model, REDUCERS[name]), pytest.raises(ValueError, match=message):
        model(**tiny.batch(ANSWERING) | changes)


def test_pairs_of_images_are_counted_and_have_types_of_their_own():
    kind = "BridgeTowerForImagesAndTextClassification"
    model, inputs = tiny.model(kind), tiny.batch(kind)
    assert len(model.bridgetower.token_type_embeddings.weight) == 3
    assert pumer.apply(model, REDUCERS["pumer"]) is model
    assert pumer.active(model).forwards_per_example == 2
    with pytest.raises(ValueError, match=r"pixel_values is \[batch, 2, 3, height, width\]"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, 0]})
    with pytest.raises(ValueError, match="num_images"):
        tiny.model(kind, num_images=0)


def test_reductions_before_the_first_layer_are_those_of_embeddings():
    model, inputs = tiny.model(ANSWERING), tiny.batch(ANSWERING)
    with pumer.reduced(model, pumer.DivPrune(keep=0.5)), pumer.trace(model) as steps:
        forward(model, inputs)
        assert pumer.active(model).lengths[0] == (9, 19)
    assert [step.layer for step in steps] == [EMBEDDINGS]
