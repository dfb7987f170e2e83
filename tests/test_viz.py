"""Token maps: what they say against the plans, their JSON, the drawing."""

import html
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llm
import torch
from PIL import Image
from tiny import batch, model

import pumer
from pumer.cli import main
from pumer.viz import draw, page, to_image, token_map, token_maps

LLAVA = Path(__file__).parents[1] / "benchmarks" / "models" / "scenes-llava"


@pytest.fixture(scope="module")
def inputs():
    return {name: value[:1] for name, value in batch().items() if name != "labels"}


@pytest.fixture(scope="module")
def words(inputs):
    return [f"w{i}" for i in range(inputs["input_ids"].shape[1])]


@pytest.fixture
def shown(inputs, words):
    net = pumer.apply(
        model(), pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 2)), trim=False
    )
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
    of = {patch: group for group in second.merged for patch in group} | {
        patch: (patch,) for patch in second.kept
    }
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


def test_json_has_every_group(shown):
    data = json.loads(shown.to_json())
    assert data["version"] == 1
    assert (data["rows"], data["columns"]) == (shown.rows, shown.columns)
    assert data["words"] == list(shown.words)
    for saved, layer in zip(data["layers"], shown.layers, strict=True):
        assert saved["layer"] == layer.layer
        assert saved["kept"] == list(layer.kept)
        assert saved["merged"] == list(map(list, layer.merged))
        assert saved["dropped"] == list(layer.dropped)
        assert saved["text"] == list(map(list, layer.text))


def test_dropped_patches_are_dark_kept_ones_clear_merged_ones_outlined(shown):
    image = Image.new("RGB", (shown.columns * 16, shown.rows * 16), (200, 120, 40))
    sheet = draw(shown, image, "a title")
    panel, gap, top = 264, 16, 58
    cell = panel / shown.columns
    layer = shown.layers[0]

    def at(patch, x, y):
        row, column = divmod(patch, shown.columns)
        left = 2 * gap + panel
        return sheet.getpixel((int(left + (column + x) * cell), int(top + (row + y) * cell)))

    assert all(sum(at(patch, 0.5, 0.5)) < 120 for patch in layer.dropped)
    for patch in (*layer.kept, *itertools.chain(*layer.merged)):
        assert at(patch, 0.5, 0.5) == (200, 120, 40)
    assert layer.merged
    for group in layer.merged:  # the first patch of a group has no neighbour of it above
        assert at(group[0], 0.5, 2.5 / cell) not in {(200, 120, 40), at(layer.kept[0], 0.5, 0.1)}


def test_drawings_have_one_width_and_wrap(shown):
    image = Image.new("RGB", (64, 64))
    once = draw(shown, image)
    assert draw(replace(shown, words=("a very long word indeed" * 3,) * len(shown.words)), image)
    long = replace(shown, layers=shown.layers[:1] * 9)
    wrapped = draw(long, image, "a title that is too long for one line " * 9)
    assert wrapped.width == once.width == draw(shown, image, "title").width
    assert wrapped.height > 3 * 264 > once.height


def test_captions_say_what_share_remains(shown):
    when, counts = shown.captions(shown.layers[0])
    left, patches = shown.layers[0].image_tokens, shown.rows * shown.columns
    assert when == "after attention of layer 0"
    assert counts.startswith(f"{left} of {patches} image tokens ({left / patches:.0%})")
    assert shown.captions(None) == ("input", f"{patches} image tokens, {len(shown.words)} words")


def test_a_page_needs_no_other_file(shown):
    image = Image.new("RGB", (64, 64))
    text = page("A <map>", shown.to_html(image, 'is there a "red" <star>?'))
    assert text.count("data:image/png;base64,") == 1
    assert "&lt;star&gt;" in text
    assert "A &lt;map&gt;" in text
    assert "http" not in text
    # Every patch is in one token of every panel.
    patches = [int(i) for found in re.findall('data-patches="(.*?)"', text) for i in found.split()]
    every = sorted([*range(shown.rows * shown.columns)] * (1 + len(shown.layers)))
    assert sorted(patches) == every


def test_a_notebook_shows_maps_and_reports(shown):
    assert shown._repr_html_().startswith("<style>")
    assert shown._repr_html_().count("<svg") == 1 + len(shown.layers)
    report = pumer.report(pumer.apply(model(), "random"))
    assert report._repr_html_() == f"<pre>{html.escape(str(report))}</pre>"


def test_images_come_back_from_pixels():
    pixels = torch.rand(3, 8, 6)
    image = to_image((pixels - 0.5) / 0.5)
    assert image.size == (6, 8)
    assert abs(image.getpixel((2, 5))[1] - 255 * pixels[1, 5, 2]) <= 0.51


def test_what_cannot_be_shown_is_said(inputs, words):
    net = model()
    with pytest.raises(ValueError, match="nothing reduces this model"):
        token_map(net, inputs, words)
    with pytest.raises(ValueError, match="nothing was reduced"):
        token_map(pumer.apply(net, pumer.Unreduced()), inputs, words)
    with pytest.raises(ValueError, match="batch of one"):
        token_map(net, {name: torch.cat([value, value]) for name, value in inputs.items()}, words)
    pair = {
        name: value[:1]
        for name, value in batch("ViltForImagesAndTextClassification").items()
        if name != "labels"
    }
    two = pumer.apply(model("ViltForImagesAndTextClassification"), pumer.PuMer(layers=(0,)))
    with pytest.raises(ValueError, match="two images"):
        token_map(two, pair, words)


# --- decoders ---


def prompt_words(family, inputs):
    return ["<image>" if i == tiny_llm.IMAGE else f"w{i}" for i in inputs["input_ids"][0].tolist()]


@pytest.mark.parametrize(
    "reducer",
    [
        pumer.FastV(keep=0.5),
        pumer.DivPrune(keep=5),
        pumer.PuMer(layers=(0, 1)),
        pumer.PyramidDrop(keep=(0.5, 0.25)),
    ],
    ids=lambda reducer: reducer.name,
)
def test_a_decoders_map_says_what_was_kept(reducer):
    net = pumer.apply(tiny_llm.model("llava"), reducer)
    inputs = tiny_llm.batch("llava", layout=((4, "i", 6),))
    words = prompt_words("llava", inputs)
    shown = token_map(net, inputs, words)
    assert (shown.rows, shown.columns) == (4, 4)
    assert shown.decoder
    assert shown.raster
    # One chip for the image, and all other words as they are.
    assert list(shown.words) == [*words[:5], "<image> x 16", *words[21:]]
    (start,) = (
        i for i, word in enumerate(words) if word == "<image>" and words[i - 1] != "<image>"
    )
    left = {place - start for place in pumer.kept(net)[0].tolist() if 0 <= place - start < 16}
    last = shown.layers[-1]
    assert {group[0] for group in (*((i,) for i in last.kept), *last.merged)} == left
    for layer in shown.layers:
        assert sorted([*layer.kept, *itertools.chain(*layer.merged), *layer.dropped]) == list(
            range(16)
        )
        assert sorted([*itertools.chain(*layer.text), *layer.text_dropped]) == list(
            range(len(shown.words))
        )


def test_every_image_of_a_prompt_has_its_map():
    net = pumer.apply(tiny_llm.model("llava"), pumer.DivPrune(keep=3))
    inputs = tiny_llm.batch("llava", layout=((2, "i", 3, "i", 2),))
    words = prompt_words("llava", inputs)
    maps = token_maps(net, inputs, words)
    assert [shown.layers[-1].image_tokens for shown in maps] == [3, 3]
    assert [word.startswith("<image>") for word in maps[0].words].count(True) == 2
    starts = [i for i, word in enumerate(words) if word == "<image>"]
    places = pumer.kept(net)[0].tolist()
    for shown, first in zip(maps, (starts[0], starts[16]), strict=True):
        assert set(shown.layers[-1].kept) == {
            place - first for place in places if 0 <= place - first < 16
        }
    with pytest.raises(ValueError, match="2 images went through the model"):
        token_map(net, inputs, words)


def test_crops_are_one_image_without_a_raster():
    net = pumer.apply(tiny_llm.model("llava_next"), pumer.FastV(keep=0.5))
    inputs = tiny_llm.batch("llava_next")
    shown = token_map(net, inputs, prompt_words("llava_next", inputs))
    assert not shown.raster
    (layer,) = shown.layers
    patches = len(layer.kept) + len(layer.dropped)
    assert len(layer.kept) == round(patches / 2)
    assert len(shown.words) == prompt_words("llava_next", inputs).index("<image>") + 1 + 6
    assert draw(shown, Image.new("RGB", (64, 64)), "crops").width > 64
    assert "data:image" not in shown.to_html(Image.new("RGB", (64, 64)))


def test_as_many_words_as_tokens(inputs):
    net = pumer.apply(model(), pumer.Uniform(prune=0.5))
    with pytest.raises(ValueError, match="give one for each"):
        token_map(net, inputs, ["a", "b"])


@pytest.mark.skipif(not LLAVA.is_dir(), reason="outside of a checkout")
def test_the_command_draws_decoders(tmp_path, capsys):
    out = tmp_path / "map.png"
    assert main(["viz", "--model", str(LLAVA), "--reducer", "fastv", "--out", str(out)]) == 0
    assert out.is_file()
    shown = json.loads(out.with_suffix(".json").read_text())
    assert (shown["rows"], shown["columns"]) == (12, 12)
    assert len(shown["layers"][0]["kept"]) == 72
    assert "<image> x 144" in "".join(shown["words"])
    assert str(out) in capsys.readouterr().out
