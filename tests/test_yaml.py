"""Settings in YAML that would never end: refused in time."""

import time

import pytest
import yaml

from pumer import presets
from pumer._yaml import load_yaml
from pumer.cli import main
from pumer.lab.train.recipe import read_settings

ALIASES = [", ".join([f"*a{level}"] * 9) for level in range(11)]
BOMBS = {
    "lists": [
        "a0: &a0 [lol]",
        *(f"a{n}: &a{n} [{aliases}]" for n, aliases in enumerate(ALIASES, 1)),
    ],
    "merges": [
        "a0: &a0 {k: 1}",
        *(f"a{n}: &a{n} {{<<: [{aliases}]}}" for n, aliases in enumerate(ALIASES, 1)),
    ],
    "itself": ["a: &a [*a]"],
    "deep": ["[" * 3000 + "]" * 3000],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(tmp_path, capsys, name):
    text = "\n".join(BOMBS[name])
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    start = time.perf_counter()
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
    with pytest.raises(ValueError, match=r"settings\.yaml is no YAML"):
        read_settings(file)
    with pytest.raises(ValueError, match=r"settings\.yaml holds no reducer"):
        presets.read_reducer(str(file))
    assert main(["train", "--config", str(file)]) == 2
    assert "settings.yaml is no YAML" in capsys.readouterr().err
    assert time.perf_counter() - start < 10


def test_aliases_that_repeat_little_are_read():
    text = "base: &base {a: 1}\none: {<<: *base, b: 2}\ntwo: [*base, *base]"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None
