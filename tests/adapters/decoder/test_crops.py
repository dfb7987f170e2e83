"""Budgets for every crop of an image, and features that are merged before the projector."""

import pytest
import tiny_llm
import torch
import torch.nn.functional as F

import pumer
from pumer import CDPruner, DivPrune, FasterVLM, HiPrune, VisionZip
from pumer.reducers import EMBEDDINGS

CROPPED = ("llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3")
SALIENCY = {"llava_next": "class", "internvl": "class"}
LAYOUT = ((2, "i", 3, "i", 2),)


def steps(model, inputs, reducer):
    """The steps of one call, the lengths after it and what is kept."""
    with pumer.reduced(model, reducer), torch.no_grad():
        model(**inputs)
        return pumer.active(model).lengths, pumer.kept(model)


def crops_of(family):
    """Patches of every crop of two images, as the builder of inputs makes them."""
    if family == "llava_next":  # crops of 4 x 4
        return [[16, 16, 16], [16] * 5]
    if (
        family == "llava_onevision"
    ):  # 8 x 8 of four crops are scaled to 5 x 5, of which the middle is the first's
        return [[16, 16, 16], [16, 9, 6, 6, 4]]
    size = 9 if family == "internvl" else 4
    return [[size], [size] * 3]


@pytest.mark.parametrize("family", CROPPED)
def test_every_crop_has_its_budget(family):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, LAYOUT)
    saliency = SALIENCY.get(family, "received")
    crops = crops_of(family)
    assert [sum(image) for image in crops] == tiny_llm.patches(family, 2)
    for reducer in (
        FasterVLM(keep=3, saliency=saliency),
        VisionZip(keep=3, saliency=saliency),
        CDPruner(keep=3),
    ):
        lengths, _ = steps(model, inputs, reducer)
        budgets = [sum(min(3, patches) for patches in image) for image in crops]
        assert lengths[-1][1] == sum(budgets)
    # Of what has no budget for each crop an image keeps that many.
    lengths, _ = steps(model, inputs, DivPrune(keep=3))
    assert lengths[-1][1] == 6


@pytest.mark.parametrize("family", CROPPED)
def test_a_crop_is_chosen_from_as_if_alone(family):
    """Every crop keeps the most salient of its own: found again from what the reducer was shown."""
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, LAYOUT)
    seen = []

    class Watched(FasterVLM):
        def plan(self, tokens):
            plan = super().plan(tokens)
            seen.append((tokens, plan))
            return plan

    steps(model, inputs, Watched(keep=2, saliency=SALIENCY.get(family, "received")))
    ((tokens, plan),) = seen
    assert tokens.layer == EMBEDDINGS
    crops = [patches for image in crops_of(family) for patches in image]
    assert tokens.valid_BN[:, tokens.image].sum(1).tolist() == crops
    assert plan.mask_BK[:, tokens.text :].sum(1).tolist() == [min(2, patches) for patches in crops]
    # No patch is in two rows, and together they are all.
    places = tokens.place_BN[:, tokens.image][tokens.valid_BN[:, tokens.image]].tolist()
    assert len(set(places)) == len(places) == sum(crops)


@pytest.mark.parametrize("family", CROPPED)
def test_every_crop_has_its_grid(family):
    """Rows and columns of what is left of it, which HiPrune looks for neighbours in."""
    model, seen = tiny_llm.model(family), []

    class Watched(HiPrune):
        def plan(self, tokens):
            seen.append(tokens)
            return super().plan(tokens)

    steps(model, tiny_llm.batch(family, LAYOUT), Watched(keep=2))
    (tokens,) = seen
    sides = {"llava_next": 4, "llava_onevision": 4, "internvl": 3, "smolvlm": 2, "idefics3": 2}
    whole = (sides[family], sides[family])
    grids = [[whole] * len(image) for image in crops_of(family)]
    if family == "llava_onevision":
        grids[1][1:] = [(3, 3), (3, 2), (2, 3), (2, 2)]
    grids = [grid for image in grids for grid in image]
    assert tokens.grid == whole
    for row, (rows, columns) in enumerate(grids):
        patches = tokens.patch_BN[row, tokens.image][tokens.valid_BN[row, tokens.image]]
        raster = torch.arange(whole[0] * whole[1]).view(whole)[:rows, :columns].flatten()
        assert torch.equal(patches, raster)


def test_crops_of_one_image_lie_as_they_are_cut():
    """LLaVA-NeXT lays the rows of its crops side by side: the crop of every patch is where its
    pixels are."""
    model = tiny_llm.model("llava_next")
    inputs = tiny_llm.batch("llava_next", (("i", 4),))
    changed = {name: value.clone() for name, value in inputs.items()}
    rows = []

    class Watched(FasterVLM):
        def plan(self, tokens):
            rows.append(tokens)
            return super().plan(tokens)

    for batch in (inputs, changed):
        changed["pixel_values"][:, 2] += 1.0  # another second crop
        steps(model, batch, Watched(keep=2))
    before, after = (tokens.states_BND[:, tokens.image] for tokens in rows)
    differs = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert differs == [False, False, True]


# --- before the projector ---


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_are_merged_before_the_projector(family, strategy):
    """What the language model gets is the projection of merged features, by hand."""
    if family == "paligemma" and strategy == "full":
        pytest.skip("it has no such choice")
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, (("i", 5), (2, "i", 3)))
    if strategy == "full":
        model.config.vision_feature_select_strategy = "full"
        ids = inputs["input_ids"]
        image = model.config.image_token_id
        rows = []
        for row, mask in zip(ids.tolist(), inputs["attention_mask"].tolist(), strict=True):
            first = row.index(image)
            rows.append(([*row[:first], image, *row[first:]], [*mask[:first], 1, *mask[first:]]))
        inputs["input_ids"] = torch.tensor([row for row, _ in rows])
        inputs["attention_mask"] = torch.tensor([mask for _, mask in rows])
    reducer = VisionZip(keep=5, contextual=2, saliency="class" if family == "llava" else "received")
    trunk, seen, choices, entered = model.model, {}, [], []

    class Watched(VisionZip):
        def plan(self, tokens):
            choices.append((tokens, super().plan(tokens)))
            return choices[-1][1]

    with pumer.reduced(model, Watched(**reducer.settings())), torch.no_grad():
        hooks = [
            trunk.multi_modal_projector.register_forward_hook(
                lambda module, args, output: seen.update(features=args[0], output=output),
                prepend=True,
            ),
            trunk.language_model.layers[0].input_layernorm.register_forward_pre_hook(
                lambda module, args: entered.append(args[0])
            ),
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    ((tokens, plan),) = choices  # before the language model nothing is chosen again
    assert seen["features"].shape[1] == 5 + tokens.num_prefix_tokens
    assert plan.total(plan.weight_BN).max() == pytest.approx(
        2.0
    )  # an average is added to its target, as published
    # Each is among what enters the language model, whose PaliGemma form scales them.
    projected, states = (F.normalize(x.float(), dim=2) for x in (seen["output"], entered[0]))
    assert (projected @ states.transpose(1, 2)).amax(2).min() > 1 - 1e-5
    assert states.shape[1] < inputs["input_ids"].shape[1]


def test_the_projector_sees_all_again_once_it_is_off():
    model = tiny_llm.model("llava")
    inputs = tiny_llm.batch("llava", (("i", 5),))
    stock = tiny_llm.logits(model, inputs)
    pumer.apply(model, VisionZip(keep=4))
    features = model.model.get_image_features(inputs["pixel_values"])  # by itself as in a call
    assert features.pooler_output[0].shape[0] == tiny_llm.patches("llava", 1)[0]
    tiny_llm.logits(model, inputs)
    pumer.remove(model)
    tiny_llm.near(tiny_llm.logits(model, inputs), stock)


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_a_sample_without_images_takes_no_crop_from_the_next(family):
    layout = ((4, "i", 6), (5,), (2, "i", 3))
    model, inputs = tiny_llm.model(family), tiny_llm.batch(family, layout)
    with pumer.reduced(model, DivPrune(keep=0.5)), pumer.trace(model) as traced:
        tiny_llm.logits(model, inputs)
    images = traced[0].prompt.images
    assert [(sample, count) for sample, count, _ in images] == [(0, 4), (2, 12)]
