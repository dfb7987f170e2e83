"""A study's plots: what is on the front, what is drawn, what is labelled."""

import re

import numpy as np
import pytest

from pumer.lab.study.curves import Setting
from pumer.lab.study.plots import AXES, FLAGSHIP, front_of, plot, separates
from pumer.lab.study.points import BASELINE


def setting(method, accuracy, gflops, peak_bytes=100 << 20, speed=None):
    """One setting of a method, of one seed, scored on ten clusters of ten examples."""
    row = {"gflops": gflops, "peak_bytes": peak_bytes, "accuracy": accuracy}
    times = {"x_unreduced": speed, "x_low": speed, "x_high": speed, "runs": 5}
    speed_row = times if speed else None
    scores = np.full(10, accuracy / 10)
    return Setting(method, "", (row,), speed_row, scores, np.full(10, 10))


@pytest.fixture
def settings():
    return [
        setting(BASELINE, 90, 10),
        setting("PuMer", 80, 6),
        setting("PuMer", 70, 4),
        setting("winner", 88, 6),
        setting("winner", 78, 4),
        setting("loser", 60, 7),
        setting("loser", 50, 5),
    ]


def drawn_texts(file):
    """Texts of an SVG plot, each with its colour."""
    found = re.findall(r"<text style=\"([^\"]*)\"[^>]*>([^<]*)</text>", file.read_text())
    colours = {text: re.search(r"fill: (#\w+)", style) for style, text in found}
    return {text: colour.group(1) if colour else "#000000" for text, colour in colours.items()}


def test_the_front_is_what_no_other_setting_beats(settings):
    located = [(value.mean("gflops"), value) for value in settings]
    front = front_of(located, more_is_better=False)
    assert [(value, one.method) for value, one in front] == [
        (4, "winner"), (6, "winner"), (10, BASELINE),
    ]  # fmt: skip
    turned = front_of([(-value, one) for value, one in located], more_is_better=True)
    assert [one for _, one in turned] == [one for _, one in front]


def test_a_plot_where_most_methods_have_one_value_is_not_drawn(settings, tmp_path):
    memory = next(axis for axis in AXES if axis.name == "memory")
    assert not separates([(memory.value(one), one) for one in settings])
    for kind in ("png", "svg"):  # of an earlier study
        (tmp_path / f"small-memory.{kind}").touch()
    assert [file.name for file in plot(settings, tmp_path, "small")] == ["small-flops.png"]
    assert {file.name for file in tmp_path.iterdir()} == {"small-flops.png", "small-flops.svg"}
    # Two of three methods need less: now it says something.
    moved = [
        one if one.method in (BASELINE, "loser") else setting(one.method, 80, 5, 50 << 20)
        for one in settings
    ]
    assert len(plot(moved, tmp_path, "small")) == 2


def test_the_front_and_pumer_have_colours_and_names(settings, tmp_path):
    (file,) = plot(settings, tmp_path, "small")
    texts = drawn_texts(file.with_suffix(".svg"))
    assert {FLAGSHIP, "winner", "unreduced"} <= set(texts)
    grey = texts.get("loser", "#8a9098")
    assert grey == "#8a9098"
    assert len({texts[FLAGSHIP], texts["winner"], grey}) == 3
    assert any("grey: 1 other method" in text for text in texts)


def test_a_method_has_one_colour_in_all_plots(settings, tmp_path):
    timed = [
        setting(one.method, one.accuracy, one.mean("gflops"), speed=10 / one.mean("gflops"))
        for one in settings
    ]
    # Fast: "loser" is on the front of the speeds alone.
    timed[-1] = setting("loser", 50, 5, speed=5.0)
    speed, flops = plot(timed, tmp_path, "small")
    colours = [drawn_texts(file.with_suffix(".svg")) for file in (speed, flops)]
    for method in (FLAGSHIP, "winner"):
        assert colours[0][method] == colours[1][method]
    assert colours[0]["loser"] != "#8a9098"
