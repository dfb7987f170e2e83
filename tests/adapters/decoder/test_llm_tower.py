"""Merging inside the vision tower of a decoder: against slow loops, and in every way such a model
is used."""

import copy

import pytest
import slow
import tiny_llm
import torch
from tiny_llm import answer, logits, near

import pumer
from pumer import Compose, DivPrune, DyMU, FastV, PuMer, ToMe, Unreduced
from pumer.adapters.decoder import kv_cache

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
TOWER = ToMe(r=3, depth=2)
RAGGED = DyMU(thresholds=(0.3, 0.3))


@pytest.fixture(scope="module")
def model():
    return tiny_llm.model("llava")


@torch.no_grad()
def slowly(model, one, tower):
    """Last logits of one sample without padding: every picture by itself through CLIP, every group
    where its first patch was."""
    trunk = model.model
    embeddings, ids = trunk.get_input_embeddings()(one["input_ids"])[0], one["input_ids"][0]
    places, states = (
        (ids != tiny_llm.IMAGE).nonzero().flatten().tolist(),
        list(embeddings[ids != tiny_llm.IMAGE]),
    )
    depth = len(trunk.vision_tower.encoder.layers) + 1 + model.config.vision_feature_layer
    patches = (ids == tiny_llm.IMAGE).nonzero().flatten().tolist()
    for number, pixels in enumerate(one.get("pixel_values", ())):
        features, members = slow.clip_groups(trunk.vision_tower, pixels, tower, depth)
        own = patches[16 * number : 16 * (number + 1)]
        places += [own[min(group) - 1] for group in members[1:]]
        states += trunk.multi_modal_projector(features[1:])
    order = sorted(range(len(places)), key=places.__getitem__)
    output = trunk.language_model(
        inputs_embeds=torch.stack([states[i] for i in order])[None],
        position_ids=torch.tensor([[places[i] for i in order]]),
    )
    return model.lm_head(output.last_hidden_state[0, -1])


@pytest.mark.parametrize("proportional", [False, True])
def test_a_merged_group_is_one_token_where_its_first_patch_was(model, proportional):
    tower = ToMe(r=(3, -0.5), depth=2, proportional=proportional)
    inputs = tiny_llm.batch("llava", LAYOUT)
    with pumer.reduced(model, Compose(tower, Unreduced())):
        found = logits(model, inputs)[:, -1]
        left = 16 - sum(tower.schedule[:2])  # features are those after the second of three layers
        assert pumer.active(model).lengths == [(8, 2 * left)] * 5
    for row in range(len(LAYOUT)):
        near(found[row], slowly(model, tiny_llm.alone("llava", LAYOUT, row), tower))


@pytest.mark.parametrize("tower", [TOWER, RAGGED], ids=["ToMe", "DyMU"])
@pytest.mark.parametrize(
    "inside", [Unreduced(), FastV(keep=0.5, layer=1), PuMer(0.2, 0.3, 0.2, layers=(0, 2))]
)
def test_a_row_of_a_batch_is_the_sample_alone(model, tower, inside):
    inputs = tiny_llm.batch("llava", LAYOUT)
    with pumer.reduced(model, Compose(tower, inside)):
        found, written = logits(model, inputs)[:, -1], answer(model, inputs, max_new_tokens=8)
        if isinstance(
            inside, Unreduced
        ):  # others choose anew where the prompt is run again with the answer in it
            assert written == answer(model, inputs, max_new_tokens=8, use_cache=False)
        for row in range(len(LAYOUT)):
            one = tiny_llm.alone("llava", LAYOUT, row)
            near(found[row], logits(model, one)[0, -1])
            assert written[row] == answer(model, one, max_new_tokens=8)[0]


def test_pictures_are_left_with_as_many_tokens_as_they_need(model):
    inputs = tiny_llm.batch("llava", ((4, "i", 6), (4, "i", 6)))
    with pumer.reduced(model, Compose(RAGGED, Unreduced())), torch.no_grad():
        cache = kv_cache.find(model(**inputs, use_cache=True))
        assert pumer.report(model).active
    filled = cache.layers[0]._pumer_layout.filled_BK.sum(1)
    assert filled[0] != filled[1]
    assert filled.max() < inputs["input_ids"].shape[1]


def test_the_tower_is_left_as_it_was(model):
    model = copy.deepcopy(model)
    inputs = tiny_llm.batch("llava", LAYOUT)
    stock = logits(model, inputs)
    pumer.apply(model, Compose(TOWER, Unreduced()))
    assert not torch.equal(logits(model, inputs), stock)
    near(logits(pumer.apply(model, Compose(ToMe(r=0, depth=2), Unreduced())), inputs), stock)
    pumer.remove(model)
    assert torch.equal(logits(model, inputs), stock)


def test_learning_reaches_the_tower_through_merged_tokens(model):
    model = copy.deepcopy(model).train()
    inputs = tiny_llm.batch("llava", LAYOUT[:2])
    with pumer.reduced(model, Compose(TOWER, FastV(keep=0.5, layer=1))):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    weight = model.model.vision_tower.embeddings.patch_embedding.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_the_report_counts_what_the_tower_spares(model):
    whole = pumer.report(model, 10, 16)
    with pumer.reduced(model, Compose(TOWER, Unreduced())):
        reduced = pumer.report(model, 10, 16)
        assert reduced.tower == (17, 14, 11)
        assert reduced.lengths == ((10, 10),) * 5
        logits(model, tiny_llm.batch("llava", LAYOUT))
        assert pumer.report(model).active
    assert whole.tower == (17,) * 3
    layer = model.model.vision_tower.encoder.layers[0]
    attention = sum(
        part.weight.numel() for part in layer.self_attn.modules() if hasattr(part, "weight")
    )
    mlp = sum(part.weight.numel() for part in layer.mlp.modules() if hasattr(part, "weight"))
    pairs = sum(2 * 24 * (17**2 - tokens**2) for tokens in (17, 14, 0))
    spared = (
        (3 + 17) * attention + (3 + 6 + 17) * mlp + pairs
    )  # the last of three layers is not run
    assert whole.parts["vision tower"] - reduced.parts["vision tower"] == spared


@pytest.mark.parametrize(
    ("family", "reducer", "words"),
    [
        (
            "llava",
            Compose(TOWER, DivPrune(keep=0.5)),
            "compose it with a reducer inside the language model",
        ),
        ("llava", Compose(ToMe(r=2, depth=9), Unreduced()), "the model has layers 0 to 1"),
        ("llava_next", Compose(TOWER, Unreduced()), "no vision tower that can be reduced"),
        ("ovis2", Compose(TOWER, Unreduced()), "no vision tower that can be reduced"),
    ],
)
def test_what_cannot_be_composed_says_so(family, reducer, words):
    model = tiny_llm.model(family)
    with pytest.raises(ValueError, match=words):
        pumer.apply(model, reducer)
    assert pumer.active(model) is None
