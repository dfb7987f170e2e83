"""`pumer convert`: published checkpoints into model folders and back, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.bridgetower.image_processing_pil_bridgetower import (
    BridgeTowerImageProcessorPil,
)

import pumer
from pumer import PuMer
from pumer.cli import main
from pumer.hub import save_official
from pumer.lab.data.images import KeepAspect, Square
from pumer.lab.data.transforms import Crop, clip_square, load_transform

REDUCERS = {
    "ViLT": PuMer(layers=(1, 2), official=True),
    "METER": PuMer(layers=(1, 2), official="meter"),
}


def checkpoint(folder, family):
    """Write a published checkpoint of a tiny model; and give that model."""
    model = tiny.model(tiny.FAMILIES[family])
    if family == "METER":
        model = tiny.model(tiny.FAMILIES[family], update="sequential")
    save_official(pumer.apply(model, REDUCERS[family]), folder)
    return model


@pytest.mark.parametrize("family", REDUCERS)
def test_there_and_back(tmp_path, capsys, family):
    model = checkpoint(tmp_path / "published", family)
    (tmp_path / "published" / "vqa2_label2ans.json").write_text(json.dumps(list("abcdefg")))
    (tmp_path / "published" / "vocab.txt").write_text("word")
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    for part in (
        type(model).__name__,
        "96 px, patches of 16 px",
        "merge_text=0.2",
        "vocab.txt",
        "answers",
        "7",
    ):
        assert part in told
    loaded, inputs = pumer.load(tmp_path / "ours"), tiny.batch(type(model).__name__)
    assert pumer.active(loaded).reducer == REDUCERS[family]
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    assert loaded.config.id2label[6] == "g"
    assert (tmp_path / "ours" / "vocab.txt").read_text() == "word"
    assert load_transform(tmp_path / "ours") == (
        clip_square(96) if family == "METER" else Square(96)
    )

    assert (
        main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published"]) == 0
    )
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("published", "back")
    )
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((tmp_path / "back" / "vqa2_label2ans.json").read_text()) == list("abcdefg")
    ratios = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [ratios[name] for name in ("prune_r", "merge_r", "merge_text")] == [0.1, 0.3, 0.2]
    assert ratios["reduce_layers"] == ([2, 4] if family == "METER" else [1, 2])
    assert load_transform(tmp_path / "back") == load_transform(tmp_path / "ours")


def test_pictures_of_another_size(tmp_path, capsys):
    checkpoint(tmp_path / "published", "METER")
    (tmp_path / "published" / "preprocessor_config.json").write_text("{}")  # of the old size
    assert (
        main(["convert", str(tmp_path / "published"), str(tmp_path / "ours"), "--image_size", "64"])
        == 0
    )
    assert "64 px, patches of 16 px" in capsys.readouterr().out
    assert pumer.load(tmp_path / "ours").config.image_size == 64
    assert load_transform(tmp_path / "ours") == clip_square(64)


@pytest.mark.filterwarnings("ignore:the published code ignores")
@pytest.mark.parametrize(
    ("family", "transform"), [("METER", Crop(96)), ("ViLT", KeepAspect(96, multiple=16))]
)
def test_original_checkpoints_get_the_original_transform(tmp_path, capsys, family, transform):
    checkpoint(tmp_path / "published", family)
    settings = json.loads((tmp_path / "published" / "config.json").read_text())
    prefix = "meter." if family == "METER" else "vilt."
    state = {
        name.removeprefix(prefix).replace("vit_model.", "vit_model.visual."): tensor
        for name, tensor in load_file(tmp_path / "published" / "model.safetensors").items()
    }
    state["vit_model.ln_final.weight"] = torch.ones(2)
    torch.save(
        {"state_dict": state, "hyper_parameters": {"config": settings}}, tmp_path / "model.ckpt"
    )
    (tmp_path / "answers.json").write_text(json.dumps(list("abcdefg")))
    words = ["convert", str(tmp_path / "model.ckpt"), str(tmp_path / "ours")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*words, "--answers", str(tmp_path / "answers.json")]) == 0
    told = capsys.readouterr().out
    assert "vit_model.ln_final.weight" in told
    assert "save that of" in told
    assert load_transform(tmp_path / "ours") == transform
    assert pumer.active(pumer.load(tmp_path / "ours")) is None
    assert main([words[0], words[1], str(tmp_path / "other"), "--to", "published"]) == 0
    assert "without names: give --answers" in capsys.readouterr().out
    kind = type(tiny.model(tiny.FAMILIES[family])).__name__.replace(
        "QuestionAnswering", "VisualEntailment"
    )
    assert main([words[0], words[1], str(tmp_path / "start"), "--kind", kind]) == 0
    assert "ve_classifier.0.bias" in capsys.readouterr().out
    assert pumer.load(tmp_path / "start").config.num_labels == 3


def test_what_cannot_be_converted(tmp_path, capsys):
    checkpoint(tmp_path / "published", "ViLT")
    pumer.save(tiny.model(), tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    for words, message in (
        (["published", "full"], "not an empty folder"),
        (["nowhere", "out"], "there is no"),
        (["nowhere.ckpt", "out"], "there is no"),
        (["published", "out", "--image_size", "50"], "no multiple of the patches"),
        (["ours", "out", "--image_size", "64"], "is a model folder already"),
    ):
        assert (
            main(["convert", str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]]) == 2
        )
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["full", "ours", "published"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path):
    """Killed at the last moment: all files are written, the folder has not yet its name."""
    checkpoint(tmp_path / "published", "ViLT")
    code = f"""
import os, signal, sys
from pumer.cli import main
import pumer.lab.commands.convert as convert
convert.save_transform = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
main(["convert", {str(tmp_path / "published")!r}, {str(tmp_path / "out")!r}])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode
        == -signal.SIGKILL
    )
    left = sorted(os.listdir(tmp_path))
    assert left[1:] == ["published"]
    assert left[0].startswith(".out.")
    # And it is no hindrance to the next one.
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_an_interrupted_conversion_clears_up(tmp_path, monkeypatch):
    checkpoint(tmp_path / "published", "ViLT")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumer.lab.commands.convert.save_transform", interrupt)
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "out")]) == 130
    assert os.listdir(tmp_path) == ["published"]


def test_a_stock_bridgetower_becomes_a_model_folder(tmp_path, capsys):
    kind = "BridgeTowerForImageAndTextRetrieval"
    model, inputs = tiny.model(kind), tiny.batch(kind)
    model.save_pretrained(tmp_path / "stock")
    sides = {"shortest_edge": 96}
    BridgeTowerImageProcessorPil(size=sides, crop_size=sides).save_pretrained(tmp_path / "stock")
    assert main(["convert", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    for part in (kind, "96 px, patches of 16 px", "up to 20 tokens, 50 different", "roberta-base"):
        assert part in told
    loaded = pumer.load(tmp_path / "ours")
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    transform = load_transform(tmp_path / "ours")
    for size in ((128, 96), (60, 250)):
        assert transform(Image.new("RGB", size)).shape == (3, 96, 96)
    (tmp_path / "stock" / "preprocessor_config.json").unlink()
    assert main(["convert", str(tmp_path / "stock"), str(tmp_path / "plain")]) == 0
    assert load_transform(tmp_path / "plain") == Crop(96)
    words = ["convert", str(tmp_path / "stock"), str(tmp_path / "none"), "--image_size", "64"]
    assert main(words) != 0
    assert "leave image_size out" in capsys.readouterr().err
