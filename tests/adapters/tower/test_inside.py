"""Vision towers in front of a language model: whole squares merge, and the language model gets one
token of each group."""

import copy

import pytest
import slow
import tiny_llm
import torch
from tiny_llm import answer, logits, near

import halves
import pumer
from pumer import Compose, DyMU, FastV, ToMe, Uniform, Unreduced
from pumer.adapters import find
from pumer.adapters.decoder import inside_tower

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
CROPS = ("internvl", "smolvlm", "idefics3", "aya_vision", "cohere2_vision", "qianfan_ocr")
ANY_SIZE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3")
FAMILIES = ("llava", "internvl", "smolvlm", "paligemma", "gemma3", "vipllava", *ANY_SIZE)
"""A family of every kind; the others are served by the same code."""
SLOWER = (
    "idefics3",
    "aya_vision",
    "cohere2_vision",
    "qianfan_ocr",
    "video_llava",
    "lighton_ocr",
    "qwen3_vl_moe",
    "qwen2_5_omni",
    "qwen3_omni",
    "exaone4_5",
    "hyperclovax",
    "cosmos3_omni",
    "cohere_compass",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "mistral_large4",
    "pixtral",
)
CASES = halves.sweep((*FAMILIES, *SLOWER), FAMILIES)


@pytest.mark.slow
def test_every_family_with_such_a_tower_is_here():
    models = {name: tiny_llm.model(name) for name in tiny_llm.FAMILIES}
    with_tower = {name for name, made in models.items() if find(made).tower_depth(made)}
    assert with_tower == {*FAMILIES, *SLOWER}


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """A model that no test leaves changed."""
    return tiny_llm.model(family)


def towers(model):
    """Reducers that act in its tower."""
    depth = find(model).tower_depth(model)
    return [ToMe(r=1), DyMU(thresholds=(0.2,) * depth), Uniform(prune=0.3, layers=(0,))]


def test_ratio_0_is_the_stock_model_and_undo_is_exact(model, family):
    model, inputs = copy.deepcopy(model), tiny_llm.batch(family, LAYOUT)
    stock = logits(model, inputs)
    with pumer.reduced(model, Compose(ToMe(r=0), Unreduced())):
        near(logits(model, inputs), stock)
    pumer.apply(model, Compose(ToMe(r=1), Unreduced()))
    assert not torch.equal(logits(model, inputs), stock)
    pumer.remove(model)
    assert torch.equal(logits(model, inputs), stock)
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_row_of_a_batch_is_the_sample_alone(model, family):
    inputs = tiny_llm.batch(family, LAYOUT)
    for tower in towers(model):
        with pumer.reduced(model, Compose(tower, Unreduced())):
            together = logits(model, inputs)
            assert pumer.report(model).active
            for row in range(len(LAYOUT)):
                one = tiny_llm.alone(family, LAYOUT, row)
                near(together[row, -1], logits(model, one)[0, -1])


def test_the_cache_goes_on_from_what_is_left(model, family):
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, Compose(ToMe(r=1), Unreduced())):
        written = answer(model, inputs, max_new_tokens=4)
        assert written == answer(model, inputs, max_new_tokens=4, use_cache=False)
        assert pumer.active(model).lengths[0][1] < pumer.active(model).entry[1]
    if find(model).before_only(model):
        return
    with pumer.reduced(model, Compose(ToMe(r=1), FastV(keep=0.5, layer=1))):
        answer(model, inputs, max_new_tokens=2)
        assert pumer.report(model).active


def test_all_of_a_group_are_one_feature(model, family, monkeypatch):
    """Were other patches merged than those of whole squares, projected features would be
    mixtures."""
    recorded = []

    def plans(*args):
        recorded.extend(stock(*args))
        return recorded

    stock = inside_tower._plans
    monkeypatch.setattr(inside_tower, "_plans", plans)
    inputs = tiny_llm.batch(family, LAYOUT)
    trunk = find(model).trunk(model)
    arguments = {name: x for name, x in inputs.items() if name.startswith(("pixel", "image"))}
    with pumer.reduced(model, Compose(ToMe(r=2), Unreduced())), torch.no_grad():
        output = trunk.get_image_features(**arguments, return_dict=True)
    features = torch.cat([each.flatten(0, -2) for each in output.pooler_output])
    planes = [features]
    if output.get("deepstack_features") is not None and len(output.deepstack_features):
        planes += list(output.deepstack_features)[-1:]
    start, groups = 0, 0
    for plan in recorded:
        slots = plan.slot_BN[0]
        own = [plane[start : start + len(slots)] for plane in planes]
        start += len(slots)
        if (
            family == "vipllava"
        ):  # features of earlier layers, where fewer were merged, are averaged
            groups += int(len(slots.unique()) < len(slots))
            continue
        for slot in slots.unique():
            members = slots == slot
            groups += int(members.sum() > 1)
            near(own[0][members], own[0][members][:1].expand(int(members.sum()), -1))
        assert len(own[0].round(decimals=3).unique(dim=0)) == len(slots.unique())
    assert start == len(features)
    assert groups


def test_the_report_counts_what_the_tower_spares(model, family):
    base, adapter = pumer.report(model), find(model)
    with pumer.reduced(model, Compose(ToMe(r=1), Unreduced())):
        report = pumer.report(model)
    depth = adapter.tower_depth(model)
    assert len(report.tower) == depth + 1
    assert report.tower[0] - report.tower[-1] == depth
    assert report.parts["vision tower"] < base.parts["vision tower"]
    assert report.lengths[0][1] < base.lengths[0][1]


@torch.no_grad()
def test_squares_merge_as_in_a_slow_loop():
    """SmolVLM's tower, image by image and square by square."""
    model = tiny_llm.model("smolvlm")
    adapter, trunk = find(model), model.model
    tower = ToMe(r=1, depth=3, proportional=True)
    pixels = tiny_llm.batch("smolvlm", LAYOUT)["pixel_values"].flatten(0, 1)
    pixels = pixels[(pixels != 0).flatten(1).any(1)]
    outputs = []
    trunk.vision_model.register_forward_hook(lambda _, args, out: outputs.append(out))
    with pumer.reduced(model, Compose(tower, Unreduced())):
        trunk.get_image_features(pixels[:, None], return_dict=True)
    assert adapter.patches_per_token(model) == 4
    for row, image in enumerate(pixels):
        states, groups = slow.square_groups(trunk.vision_model, image, tower, side=2)
        expected = trunk.vision_model.post_layernorm(states)
        near(outputs[-1].last_hidden_state[row], expected)
        assert len(groups) == 4 - 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_dropping_is_masking_in_windows_and_images(family):
    """Units that are dropped after the attention of a layer are keys that no later layer sees."""
    model = tiny_llm.model(family)
    visual, inputs = model.model.visual, tiny_llm.batch(family, LAYOUT)
    arguments = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    captured = {}
    keep = visual.merger.register_forward_pre_hook(
        lambda _, args: captured.__setitem__("states", args[0])
    )
    with pumer.reduced(model, Compose(Uniform(prune=0.4, layers=(0,)), Unreduced())):
        recorded = []
        stock_finish = inside_tower._finish

        def finish(*args):
            recorded.append(args[-2])
            return stock_finish(*args)

        inside_tower._finish = finish
        try:
            pumer.apply(model, pumer.active(model).reducer)
            model.model.get_image_features(**arguments)
        finally:
            inside_tower._finish = stock_finish
    run, reduced = recorded[0], captured["states"]
    kept = torch.cat(
        [
            slots[:length] >= 0
            for slots, length in zip(run.plan.slot_BN, run.axis.entered, strict=True)
        ]
    ).repeat_interleave(run.axis.unit)
    first = run.spec.acts[0]
    masks = []

    def mask(index):
        def attend(module, query, key, value, attention_mask, **kwargs):
            start = masks[index]
            masks[index] += key.shape[2]
            seen = kept[start : start + key.shape[2]] | (index <= first)
            seen = seen | ~seen.any()  # a window that is empty is nobody's
            context = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen[None]
            )
            return context.transpose(1, 2), None

        return attend

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = [0] * len(visual.blocks)
    for index, layer in enumerate(visual.blocks):
        ALL_ATTENTION_FUNCTIONS.register(f"masked_{index}", mask(index))
        layer.attn.config = copy.copy(layer.attn.config)
        layer.attn.config._attn_implementation_internal = f"masked_{index}"
    model.model.get_image_features(**arguments)
    keep.remove()
    near(reduced, captured["states"][kept])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llava_next", "crops are trimmed behind the tower"),
        ("llava_onevision", "crops are trimmed behind the tower"),
        ("fuyu", "no vision tower that can be reduced"),
        ("glm4v", "no vision tower that can be reduced"),
    ],
)
def test_a_tower_that_cannot_be_reduced_says_why(family, words):
    model = tiny_llm.model(family)
    with pytest.raises(ValueError, match=words) as error:
        pumer.apply(model, Compose(ToMe(r=1), Unreduced()))
    assert len(str(error.value).splitlines()) == 1
    assert pumer.active(model) is None
