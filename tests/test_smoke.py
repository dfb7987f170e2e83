"""Smoke tests: what has to work with every version of every dependency, with and without extras.

`make test-versions` runs them in environments of their own; see docs/versions.md.
"""

import os
import subprocess
import sys

import pytest
import tiny
import tiny_llm
import torch

import pumer
from pumer.cli import COMMANDS, main
from pumer.lab.data.image_store import open_store
from pumer.lab.score.ray import Cluster, spread
from pumer.lab.study import run as run_study

pytestmark = pytest.mark.smoke

DIVPRUNE = pumer.DivPrune(keep=0.4)
ENCODER_REDUCERS = {
    "divprune": DIVPRUNE,
    "pumer": pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(1, 2)),
}
DECODER_REDUCERS = {
    "fastv": pumer.FastV(keep=0.5, layer=1),
    "divprune": DIVPRUNE,
    "pumer": pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 2)),
}
EXTRAS = ("lmdb", "lmms_eval", "matplotlib", "optuna", "ray", "scipy", "shtab", "tensorboard")
"""Packages that only an extra brings."""
LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2))
"""Prompts of a batch: one image, and two between words, so that the first is padded."""


@pytest.fixture(scope="module", params=tiny.FAMILIES.values())
def encoder(request):
    """(class, its tiny model)."""
    return request.param, tiny.model(request.param)


@pytest.fixture(scope="module", params=tiny_llm.BUILDERS)
def decoder(request):
    """(family, its tiny model)."""
    return request.param, tiny_llm.model(request.param)


def encoder_logits(model, inputs):
    """Logits without gradient, from the same seed: stock ViLT draws the order of its patches."""
    torch.manual_seed(0)
    return tiny.logits(model, inputs)


def image_tokens(model):
    """Image tokens after the last layer, in the last call of a model that `apply` has been called
    on."""
    return pumer.active(model).lengths[-1][1]


def attributes(model):
    """Names of the attributes of every part, and how many hooks it has."""
    return {
        name: (sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    }


def unreduced_image_tokens(model, inputs):
    """Image tokens after the last layer where nothing is reduced."""
    with pumer.reduced(model, pumer.Unreduced()):
        tiny_llm.logits(model, inputs)
        return image_tokens(model)


# --- encoders ---


@pytest.mark.parametrize("name", ENCODER_REDUCERS)
def test_an_encoder_is_reduced_and_restored(encoder, name):
    kind, model = encoder
    inputs = tiny.batch(kind)
    stock, before = encoder_logits(model, inputs), attributes(model)
    tokens = unreduced_image_tokens(model, inputs)
    with pumer.reduced(model, ENCODER_REDUCERS[name]):
        reduced = encoder_logits(model, inputs)
        assert image_tokens(model) < tokens
        for row in range(len(reduced)):
            tiny_llm.near(encoder_logits(model, tiny.alone(inputs, row)), reduced[row : row + 1])
    assert not torch.allclose(reduced, stock)
    assert torch.equal(encoder_logits(model, inputs), stock)
    assert attributes(model) == before


@pytest.mark.parametrize("name", ENCODER_REDUCERS)
def test_an_encoder_trains(encoder, name):
    kind, model = encoder
    inputs = tiny.batch(kind)
    with pumer.reduced(model, ENCODER_REDUCERS[name]):
        model(**inputs).logits.sum().backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )
    assert sum(parameter.grad is not None for parameter in model.parameters()) > 10
    model.zero_grad()


# --- decoders ---


@pytest.mark.parametrize("name", DECODER_REDUCERS)
def test_a_decoder_is_reduced_and_restored(decoder, name):
    family, model = decoder
    inputs = tiny_llm.batch(family, LAYOUT)
    # transformers adds hooks of its own in the first forward
    stock, before = tiny_llm.logits(model, inputs), attributes(model)
    tokens = unreduced_image_tokens(model, inputs)
    with pumer.reduced(model, DECODER_REDUCERS[name]):
        reduced = tiny_llm.logits(model, inputs)
        assert image_tokens(model) < tokens
        for row in range(len(LAYOUT)):
            alone = tiny_llm.logits(model, tiny_llm.alone(family, LAYOUT, row))
            tiny_llm.near(reduced[row : row + 1, -alone.shape[1] :], alone)
    assert not torch.allclose(reduced, stock)
    assert torch.equal(tiny_llm.logits(model, inputs), stock)
    assert attributes(model) == before


@pytest.mark.parametrize("name", DECODER_REDUCERS)
def test_a_decoder_generates(decoder, name):
    family, model = decoder
    inputs = tiny_llm.batch(family, LAYOUT)
    stock = tiny_llm.answer(model, inputs)
    suppressed = tiny_llm.GREEDY["suppress_tokens"]
    with pumer.reduced(model, DECODER_REDUCERS[name]):
        answers = tiny_llm.answer(model, inputs)
        allowed = tiny_llm.logits(model, inputs)[:, -1].index_fill(
            1, torch.tensor(suppressed), float("-inf")
        )
        assert [answer[0] for answer in answers] == allowed.argmax(1).tolist()
        for row in range(len(LAYOUT)):
            assert (
                tiny_llm.answer(model, tiny_llm.alone(family, LAYOUT, row))
                == answers[row : row + 1]
            )
    assert tiny_llm.answer(model, inputs) == stock


# --- folders ---


def test_a_saved_encoder_comes_back(encoder, tmp_path):
    kind, model = encoder
    inputs = tiny.batch(kind)
    with pumer.reduced(model, ENCODER_REDUCERS["pumer"]):
        reduced = tiny.logits(model, inputs)
        pumer.save(model, tmp_path / "model")
    assert torch.equal(tiny.logits(pumer.load(tmp_path / "model"), inputs), reduced)


def test_a_saved_decoder_comes_back(decoder, tmp_path):
    family, model = decoder
    inputs = tiny_llm.batch(family, LAYOUT)
    with pumer.reduced(model, DECODER_REDUCERS["pumer"]):
        reduced = tiny_llm.logits(model, inputs)
        pumer.save(model, tmp_path / "model")
    tiny_llm.near(tiny_llm.logits(pumer.load(tmp_path / "model"), inputs), reduced)


# --- the command line, and what it says without extras ---


def test_the_report_of_a_saved_model(tmp_path, capsys):
    model = pumer.apply(tiny.model(), ENCODER_REDUCERS["pumer"])
    pumer.save(model, tmp_path / "model")
    assert main(["report", "--model", str(tmp_path / "model")]) == 0
    assert str(pumer.report(model)) in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert f"usage: pumer {command}" in capsys.readouterr().out


@pytest.fixture
def without_extras(monkeypatch):
    """As if no extra was installed."""
    for package in EXTRAS:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.usefixtures("without_extras")
def test_what_a_command_misses_is_named(tmp_path, capsys):
    assert (
        main(["tune", "--model", "model", "--out", str(tmp_path / "out"), "--max_drop", "1"]) == 2
    )
    assert "pip install '.[tune]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"pip install '\.\[study\]'"):
        run_study(None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"pip install '\.\[ray\]'"):
        next(spread(None, [0], Cluster()))
    (tmp_path / "images.lmdb").touch()
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
        open_store(tmp_path / "images.lmdb")
    assert not (tmp_path / "out").exists()


def test_nothing_but_running_it_needs_an_extra():
    """In a process of its own, where no extra has been imported before."""
    modules = sorted({target.split(":")[0] for target, _ in COMMANDS.values()})
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({EXTRAS}))
for module in {modules}:
    importlib.import_module(module)
import pumer, tiny
pumer.apply(tiny.model(), pumer.PuMer(layers=(1,)))(**tiny.batch())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
