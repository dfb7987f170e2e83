"""Vision towers by themselves: equal to the stock model at ratio 0, to a slow loop, alone and in a
batch, dropped and masked."""

import copy
import pickle
from functools import partial

import pytest
import slow
import tiny_towers
import torch
from tiny_towers import LAYERS, PATCHES, answer
from torch.utils.checkpoint import checkpoint

import pumer
from pumer import DivPrune, DyMU, Energy, Pool, PuMer, Random, ToMe, Uniform
from pumer.adapters import find

EVERY_CLASS = pytest.mark.parametrize("name", tiny_towers.CONFIGS)
IDENTITIES = [
    ToMe(r=0),
    DyMU(thresholds=(0.9999,) * LAYERS),
    Random(prune=0),
    Pool(window=1, layer=1),
]
REDUCERS = {
    "tome": ToMe(r=3),
    "tome-decreasing": ToMe(r=(4, -1.0), proportional=False),
    "dymu": DyMU(thresholds=(0.2, 1.0, 0.1, 0.4)),
    "uniform": Uniform(prune=0.3, layers=(0, 2)),
    "random": Random(prune=0.4, layers=(-1, 2), seed=1),
    "divprune": DivPrune(keep=0.5),
    "energy": Energy(DivPrune(), tau=0.8, least=2, most=0.7),
}


def close(one, other, tolerance=1e-4):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@EVERY_CLASS
def test_ratio_0_is_the_stock_model_and_undo_is_exact(name):
    model, inputs = tiny_towers.model(name), tiny_towers.batch(name)
    stock, state = answer(model, inputs), set(vars(tiny_towers.vision(model)))
    padded = name.startswith("Siglip2")  # whose patches are no grid
    for reducer in IDENTITIES[:-1] if padded else IDENTITIES:
        with pumer.reduced(model, reducer):
            close(answer(model, inputs), stock, 1e-5)
    pumer.apply(model, ToMe(r=3))
    assert not torch.equal(answer(model, inputs), stock)
    pumer.remove(model)
    assert torch.equal(answer(model, inputs), stock)
    assert set(vars(tiny_towers.vision(model))) == state
    assert not any(part._forward_pre_hooks or "forward" in vars(part) for part in model.modules())


@EVERY_CLASS
@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
def test_a_row_of_a_batch_is_the_image_alone(name, reducer):
    model, inputs = tiny_towers.model(name), tiny_towers.batch(name)
    with pumer.reduced(model, reducer):
        together = answer(model, inputs)
        assert pumer.report(model).active
        for row in range(len(together)):
            close(answer(model, tiny_towers.alone(inputs, row))[0], together[row])


@EVERY_CLASS
def test_sizes_and_places_can_be_read(name):
    model, inputs = tiny_towers.model(name), tiny_towers.batch(name)
    first = find(model).num_prefix_tokens
    real = first + inputs.get("pixel_attention_mask", torch.ones(3, PATCHES)).sum(1)
    with pumer.reduced(model, ToMe(r=3)):
        answer(model, inputs)
        patch, kept = pumer.active(model), pumer.kept(model)
    assert patch.lengths == [(0, first + PATCHES - 3 * layer) for layer in range(LAYERS + 1)]
    assert torch.equal(patch.sizes.sum(1), real.float())
    for row, (slots, places) in enumerate(zip(patch.slots.tolist(), kept.tolist(), strict=True)):
        members = [[token for token, at in enumerate(slots) if at == k] for k in range(len(places))]
        assert [len(group) for group in members] == patch.sizes[row].tolist()
        assert [min(group) for group in members if group] == [at for at in places if at >= 0]


@pytest.mark.parametrize("name", [name for name in tiny_towers.CONFIGS if "Siglip2" not in name])
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tome_is_the_slow_loop(name, proportional, attention):
    if "Model" not in name:
        pytest.skip("its head has a test of its own")
    model, inputs = tiny_towers.model(name), tiny_towers.batch(name)
    vision, first = tiny_towers.vision(model), find(model).num_prefix_tokens
    tower = ToMe(r=(3, -0.5), depth=LAYERS, proportional=proportional)
    with pumer.reduced(model, tower, attention=attention), torch.no_grad():
        states = vision(inputs["pixel_values"]).last_hidden_state
        slots = pumer.active(model).slots
    for row, pixels in enumerate(inputs["pixel_values"]):
        with torch.no_grad():
            expected, groups = slow.tower_groups(vision, pixels, tower, first)
            norm = next(
                getattr(vision, at) for at in ("layernorm", "post_layernorm") if hasattr(vision, at)
            )
            expected = expected if "CLIP" in name else norm(expected)
        close(states[row], expected)
        for slot, group in enumerate(groups):
            assert group == {token for token, at in enumerate(slots[row].tolist()) if at == slot}


@pytest.mark.parametrize("name", [name for name in tiny_towers.CONFIGS if "Siglip2" not in name])
def test_dropping_is_masking(name):
    """A patch that is dropped after the attention of a layer is one that no later layer, and no
    pooling, looks at."""
    model, inputs = tiny_towers.model(name, "eager"), tiny_towers.batch(name)
    vision, layer = tiny_towers.vision(model), 1
    with pumer.reduced(model, Uniform(prune=0.4, layers=(layer,)), attention="eager"):
        reduced = answer(model, inputs)
        gone = pumer.active(model).slots < 0
    assert gone.any()
    handles, layers = [], find(model).layers(model)
    bias = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)

    def mask(_, args, kwargs):
        return args[:1], kwargs | {"attention_mask": bias[:, None, None]}

    for later in layers[layer + 1 :]:
        part = later.self_attn if hasattr(later, "self_attn") else later.attention
        handles.append(part.register_forward_pre_hook(mask, with_kwargs=True))
    if hasattr(vision, "head"):
        pooling = vision.head.attention
        heads = bias[:, None].repeat_interleave(pooling.num_heads, 0)
        handles.append(
            pooling.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attn_mask": heads}), with_kwargs=True
            )
        )
    if name in ("CLIPForImageClassification", "SiglipForImageClassification") or (
        name == "Dinov2ForImageClassification"
    ):

        def without_dropped(_, args, output):
            first, states = find(model).num_prefix_tokens, output.last_hidden_state
            patches = [
                row[first:][~at[first:]].mean(0) for row, at in zip(states, gone, strict=True)
            ]
            filled = torch.stack(patches)[:, None].expand_as(states[:, first:])
            output.last_hidden_state = torch.cat([states[:, :first], filled], 1)
            return output

        handles.append(vision.register_forward_hook(without_dropped))
    expected = answer(model, inputs)
    for handle in handles:
        handle.remove()
    close(reduced, expected)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_features_of_images_are_those_of_retrieval(name):
    """`get_image_features` is reduced like a forward; texts are left alone."""
    model, inputs = tiny_towers.model(name), tiny_towers.batch(name)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        text = model.get_text_features(ids).pooler_output
        stock = model.get_image_features(**inputs).pooler_output
        with pumer.reduced(model, ToMe(r=3)):
            assert torch.equal(model.get_text_features(ids).pooler_output, text)
            reduced = model.get_image_features(**inputs).pooler_output
            forward = model(input_ids=ids, **inputs).image_embeds
    assert not torch.equal(reduced, stock)
    close(reduced / reduced.norm(dim=-1, keepdim=True), forward)


def test_merged_tokens_are_as_good_as_the_patches_that_they_stand_for():
    """Two equal halves of an image: merging equal patches changes nothing, if sizes count."""
    for name in ("SiglipVisionModel", "SiglipForImageClassification", "CLIPVisionModel"):
        model = tiny_towers.model(name)
        with torch.no_grad():
            for part in model.modules():
                if hasattr(part, "position_embedding"):
                    part.position_embedding.weight.zero_()
        pixels = torch.randn(2, 3, 48, 8, generator=torch.Generator().manual_seed(1))
        inputs = {"pixel_values": pixels.repeat(1, 1, 1, 6)}
        stock = answer(model, inputs)
        with pumer.reduced(model, ToMe(r=[15, 8])):
            close(answer(model, inputs), stock, 1e-4)


def test_hidden_states_have_the_lengths_of_their_layers():
    model, inputs = tiny_towers.model("ViTModel"), tiny_towers.batch("ViTModel")
    with pumer.reduced(model, ToMe(r=3)), torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    assert [states.shape[1] for states in output.hidden_states] == [37, 34, 31, 28, 25]
    assert output.last_hidden_state.shape[1] == 25


@pytest.mark.parametrize("name", ["ViTModel", "SiglipVisionModel"])
def test_gradients_and_their_recomputation(name):
    model, inputs = tiny_towers.model(name).train(), tiny_towers.batch(name)
    pumer.apply(model, ToMe(r=3))
    model(**inputs).pooler_output.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(grad.isfinite().all() for grad in expected)
    model.zero_grad()
    for layer in find(model).layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    model(**inputs).pooler_output.sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_patch_of_its_own(copied):
    model, inputs = tiny_towers.model("CLIPModel"), tiny_towers.batch("CLIPModel")
    pumer.apply(model, ToMe(r=3))
    twin = copied(model)
    expected = answer(model, inputs)
    assert torch.equal(answer(twin, inputs), expected)
    pumer.remove(model)
    assert torch.equal(answer(twin, inputs), expected)
    assert pumer.active(twin).lengths[-1] == (0, 25)


def test_the_report_counts_what_is_spared():
    model = tiny_towers.model("ViTModel")
    base = pumer.report(model)
    width, inner = 24, 40
    layers = [37 * 4 * width**2 + 2 * 37**2 * width, 2 * 37 * width * inner]
    assert base.entry == (0, 37)
    assert base.parts["attention"] == LAYERS * layers[0]
    assert base.parts["mlp"] == LAYERS * layers[1]
    assert base.parts["embedding"] == 36 * 3 * 64 * width
    with pumer.reduced(model, ToMe(r=3)):
        report = pumer.report(model)
    spared = sum(2 * 3 * (layer + 1) * width * inner for layer in range(LAYERS))
    assert base.parts["mlp"] - report.parts["mlp"] == spared
    assert report.ratio > 1
    with pytest.raises(ValueError, match="leave text out"):
        pumer.report(model, text=5)


@pytest.mark.parametrize(
    ("reducer", "words"),
    [
        (PuMer(layers=(1,)), "guided by the text"),
        (pumer.FastV(keep=0.5, layer=1), "guided by the text"),
        (pumer.NoVision(), "leaves no image token"),
        (pumer.FasterVLM(keep=0.5), "reads the"),
        (pumer.Compose(ToMe(), pumer.Unreduced()), "no vision tower that can be reduced"),
        (ToMe(r=3, depth=9), "give depth=4"),
    ],
)
def test_what_cannot_act_there_says_so(reducer, words):
    model = tiny_towers.model("ViTModel")
    with pytest.raises(ValueError, match=words) as error:
        pumer.apply(model, reducer)
    assert len(str(error.value).splitlines()) <= 5
    assert pumer.active(model) is None
