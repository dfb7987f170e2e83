"""Reducers and model families that another package brings along."""

import sys
import textwrap
import warnings

import pytest
import tiny
import torch

import pumer
from pumer import _plugins
from pumer.adapters import base
from pumer.cli import main
from pumer.reducers import list_reducers, registry

REDUCER = """
from dataclasses import dataclass

from pumer.reducers import Selector
from pumer.reducers.selector import best, candidates, image_states


@dataclass(frozen=True)
class Loudest(Selector):
    '''Keep the image tokens with the largest states.

    Args:
        keep: how many.
    '''

    name = "loudest-of-all"
    keep: float = 0.5

    def select(self, tokens, num_keep_B, most):
        return best(image_states(tokens).norm(dim=-1), candidates(tokens), num_keep_B)
"""
FAMILY = """
from transformers import ViltForQuestionAnswering

from pumer.adapters.encoder.vilt import ViltAdapter


class OwnVilt(ViltForQuestionAnswering):
    pass


class OwnAdapter(ViltAdapter):
    family = "OwnViLT"
    classes = ("OwnVilt",)
    modules = {"OwnVilt": "own_plugin.family"}
"""


def install(folder, entry_points):
    """Write a package as pip would leave it in a folder."""
    package, info = folder / "own_plugin", folder / "own_plugin-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "reducer.py").write_text(REDUCER)
    (package / "family.py").write_text(FAMILY)
    (package / "broken.py").write_text("raise RuntimeError('out of order')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


GOOD = """
    [pumer.reducers]
    loudest-of-all = own_plugin.reducer:Loudest

    [pumer.models]
    own-vilt = own_plugin.family:OwnAdapter
"""
BROKEN = """
    [pumer.reducers]
    broken-one = own_plugin.broken:Nothing
    no-reducer = own_plugin.reducer:dataclass
    loudest-of-all = own_plugin.reducer:Loudest
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Installs entry points in a folder on the path, and forgets them afterwards."""
    monkeypatch.setattr(registry, "_REDUCERS", dict(registry._REDUCERS))
    monkeypatch.setattr(base, "_ADAPTERS", list(base._ADAPTERS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_plugins, "_loading", set())
    yield lambda entry_points: install(tmp_path, entry_points)
    for name in [name for name in sys.modules if name.startswith("own_plugin")]:
        del sys.modules[name]


def test_a_reducer_and_a_family_of_another_package(plugins, tmp_path):
    plugins(GOOD)
    assert "own_plugin" not in sys.modules
    model = pumer.apply(tiny.model(), "loudest-of-all")
    assert pumer.active(model).reducer.keep == 0.5
    assert "loudest-of-all" in list_reducers()
    from own_plugin.family import OwnVilt

    own = OwnVilt(tiny.config(num_labels=7)).eval()
    pumer.apply(own, {"reducer": "loudest-of-all", "keep": 3})
    assert pumer.active(own).adapter.family == "OwnViLT"
    pumer.save(own, tmp_path / "saved")
    loaded = pumer.load(tmp_path / "saved")
    assert type(loaded) is OwnVilt
    inputs = tiny.batch()
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(own, inputs))


def test_a_broken_plugin_is_one_warning_and_the_others_work(plugins):
    plugins(BROKEN)
    with pytest.warns(UserWarning, match="own-plugin") as caught:
        assert "loudest-of-all" in list_reducers()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "the plugin 'broken-one' (own_plugin.broken:Nothing, of own-plugin)" in messages[0]
    assert "RuntimeError: out of order" in messages[0]
    assert "is no subclass of pumer.Reducer" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_reducers()


def test_our_own_names_need_no_plugin(plugins):
    plugins(BROKEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pumer.apply(tiny.model(), "tome")


def test_commands_know_them(plugins, capsys):
    plugins(GOOD)
    assert "own_plugin" not in sys.modules
    main(
        ["report", "--model", "scenes-vilt", "--reducer", "loudest-of-all", "--reducer.keep", "20"]
    )
    main(["list"])
    output = capsys.readouterr().out
    assert "loudest-of-all(keep=20)" in output
    assert "OwnViLT" in output
