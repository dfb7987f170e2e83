"""Token maps: what they say against the plans, their JSON, the drawing."""

import itertools

import pytest
import torch
from PIL import Image

import pumer
from pumer.viz import TokenMap, draw, gallery, png, to_picture, token_map
from tiny import batch, model


@pytest.fixture(scope="module")
def inputs():
    return {name: value[:1] for name, value in batch().items() if name != "labels"}


@pytest.fixture(scope="module")
def words(inputs):
    return [f"w{i}" for i in range(inputs["input_ids"].shape[1])]


@pytest.fixture
def shown(inputs, words):
    net = pumer.apply(model(), pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 2)), trim=False)
    return token_map(net, inputs, words)


def test_every_patch_is_kept_merged_or_dropped_once(shown):
    for layer in shown.layers:
        patches = [*layer.kept, *itertools.chain(*layer.merged), *layer.dropped]
        assert sorted(patches) == list(range(shown.rows * shown.columns))
        words = [*itertools.chain(*layer.text), *layer.text_dropped]
        assert sorted(words) == list(range(len(shown.words)))
        assert all(len(group) > 1 for group in layer.merged)


def test_groups_only_grow_and_dropped_patches_stay_dropped(shown):
    first, second = shown.layers
    assert set(first.dropped) <= set(second.dropped)
    of = {patch: group for group in second.merged for patch in group} | {patch: (patch,) for patch in second.kept}
    for group in first.merged:
        assert len({of.get(patch) for patch in group}) == 1
    assert second.image_tokens < first.image_tokens


def test_the_map_says_what_the_plan_does(inputs, words):
    net = pumer.apply(model(), pumer.Uniform(prune=0.5), trim=False)
    with pumer.trace(net) as steps, torch.no_grad():
        net(**inputs)
    (layer,) = token_map(net, inputs, words).layers
    slots, patches = steps[0].plan.slot_BN[0], steps[0].patch_BN[0]
    assert set(layer.kept) == set(patches[(slots >= 0) & (patches >= 0)].tolist())
    assert layer.layer == -1
    assert layer.merged == ()


def test_json_comes_back_as_it_was(shown):
    assert TokenMap.from_json(shown.to_json()) == shown
    with pytest.raises(ValueError, match="version 1"):
        TokenMap.from_json(shown.to_json().replace('"version": 1', '"version": 9'))


def test_dropped_patches_are_dark_and_kept_ones_clear(shown):
    picture = Image.new("RGB", (shown.columns * 16, shown.rows * 16), (200, 120, 40))
    sheet = draw(shown, picture, "a title")
    cell, gap, top = 264 // shown.columns, 16, 34
    x0 = 2 * gap + cell * shown.columns
    layer = shown.layers[0]

    def middle(patch):
        row, column = divmod(patch, shown.columns)
        return x0 + column * cell + cell // 2, top + row * cell + cell // 2

    assert sheet.height > top + cell * shown.rows
    assert all(sum(sheet.getpixel(middle(patch))) < 120 for patch in layer.dropped)
    assert all(sheet.getpixel(middle(patch)) == (200, 120, 40) for patch in layer.kept)


def test_gallery_needs_no_other_file(shown, tmp_path):
    image = draw(shown, Image.new("RGB", (64, 64)))
    gallery([(image, 'is there a "red" <star>?')], tmp_path / "page.html", "Maps")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64," in page
    assert "&lt;star&gt;" in page
    assert "http" not in page
    assert png(image).startswith(b"\x89PNG")


def test_pictures_come_back_from_pixels():
    pixels = torch.rand(3, 8, 6)
    picture = to_picture((pixels - 0.5) / 0.5)
    assert picture.size == (6, 8)
    assert abs(picture.getpixel((2, 5))[1] - 255 * pixels[1, 5, 2]) <= 0.51


def test_what_cannot_be_shown_is_said(inputs, words):
    net = model()
    with pytest.raises(ValueError, match="nothing reduces this model"):
        token_map(net, inputs, words)
    with pytest.raises(ValueError, match="nothing was reduced"):
        token_map(pumer.apply(net, pumer.Unreduced()), inputs, words)
    with pytest.raises(ValueError, match="batch of one"):
        token_map(net, {name: torch.cat([value, value]) for name, value in inputs.items()}, words)
    pair = {name: value[:1] for name, value in batch("ViltForImagesAndTextClassification").items() if name != "labels"}
    two = pumer.apply(model("ViltForImagesAndTextClassification"), pumer.PuMer(layers=(0,)))
    with pytest.raises(ValueError, match="two pictures"):
        token_map(two, pair, words)
