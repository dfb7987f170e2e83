"""Saving and loading, and what is said when a file is not as it should be."""

import json
import os
from pathlib import Path

import matrix
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import pumer
from pumer.hub import model_class
from pumer.models.vilt.entailment import ViltForVisualEntailment

# --- save and load ---


@pytest.mark.parametrize(
    "reducer", [*matrix.REDUCERS.values(), matrix.OFFICIAL], ids=[*matrix.REDUCERS, "official"]
)
def test_a_saved_model_comes_back(tmp_path, reducer):
    model, inputs = pumer.apply(tiny.model(), reducer, attention="eager", trim=False), tiny.batch()
    pumer.save(model, tmp_path / "model")
    loaded = pumer.load(tmp_path / "model")
    patch = pumer.active(loaded)
    assert (patch.reducer, patch.attention, patch.trim) == (reducer, "eager", False)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    assert not loaded.training
    assert os.listdir(tmp_path) == ["model"]
    settings = json.loads((tmp_path / "model" / "pumer.json").read_text())
    assert (settings["format"], settings["pumer"]) == (1, pumer.__version__)


@pytest.mark.parametrize("kind", tiny.CLASSES)
def test_every_class_comes_back(tmp_path, kind):
    model, inputs = pumer.apply(tiny.model(kind), matrix.REDUCERS["pumer"]), tiny.batch(kind)
    pumer.save(model, tmp_path / "model")
    loaded = pumer.load(tmp_path / "model")
    assert type(loaded) is type(model)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


def test_an_unreduced_model_comes_back_unreduced(tmp_path):
    tmp_path.joinpath("model").mkdir()  # an empty folder is as good as none
    pumer.save(tiny.model(), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "pumer.json").read_text())["reducer"] is None
    assert pumer.active(pumer.load(str(tmp_path / "model"))) is None


def test_dtype_and_device_can_be_chosen(tmp_path):
    pumer.save(tiny.model(), tmp_path / "model")
    assert pumer.load(tmp_path / "model").dtype == torch.float32
    loaded = pumer.load(tmp_path / "model", dtype=torch.bfloat16, device="meta")
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "meta")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"not an empty folder: name another one, or delete"):
        pumer.save(tiny.model(), tmp_path)
    with pytest.raises(ValueError, match="is a file: name a folder"):
        pumer.save(tiny.model(), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_is_left_of_a_save_that_failed(tmp_path, monkeypatch):
    model = tiny.model()

    def fail(folder):
        (Path(folder) / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pumer.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        pumer.save(torch.nn.Linear(2, 2), tmp_path / "model")


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model, to be damaged."""
    pumer.save(pumer.apply(tiny.model(), matrix.REDUCERS["pumer"]), tmp_path / "model")
    return tmp_path / "model"


def change(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "pumer": "9.1"}, r"format 2, written by pumer 9\.1.*upgrade pumer"),
        ({"format": None}, "damaged"),
        ({"format": True}, "damaged, its format is True"),
        ({"trim": "yes"}, "trim is 'yes'; expected bool"),
        ({"colour": "red"}, "should have the entries"),
        ({"reducer": {"reducer": "pumer", "prune": 0.1, "haste": 3}}, "pumer has no setting haste"),
        ({"reducer": {"reducer": "shrink"}}, "no reducer is named 'shrink'"),
        ({"reducer": {"reducer": "pumer", "prune": 2}}, "prune is a ratio"),
        (
            {"reducer": {"reducer": "pumer", "prune": "much"}},
            "reducer pumer: prune is 'much'; expected float",
        ),
        ({"reducer": "pumer"}, r"reducer is 'pumer'; expected dict"),
        ({"reducer": {"reducer": "pumer", "layers": [40]}}, r"reduces in layers \[40\]"),
        ({"attention": "fast"}, "attention is one of"),
    ],
)
def test_settings_that_cannot_be_read(saved, changes, message):
    change(saved / "pumer.json", **changes)
    with pytest.raises(ValueError, match=message):
        pumer.load(saved)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pumer.json", None, r"there is no .*pumer\.json: pumer\.save writes it"),
        ("pumer.json", b"{", r"pumer\.json cannot be read"),
        ("pumer.json", b"[]", r"pumer\.json is damaged"),
        ("config.json", None, r"has no config\.json"),
        ("model.safetensors", None, "cannot be read, save it again"),
        ("model.safetensors", b"\0" * 50, "cannot be read, save it again"),
    ],
)
def test_files_that_are_missing_or_damaged(saved, file, content, message):
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pumer.load(saved)


def test_missing_weights_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["classifier.3.bias"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack classifier\.3\.bias"):
        pumer.load(saved)


def test_surplus_weights_are_named(saved):
    layers = json.loads((saved / "config.json").read_text())["num_hidden_layers"]
    change(saved / "config.json", num_hidden_layers=layers - 1)
    with pytest.raises(
        ValueError, match=rf"have .*layer\.{layers - 1}\..*restore its config\.json"
    ):
        pumer.load(saved)


def test_the_model_class_has_to_be_known(saved):
    for name in ("MyVilt", "ViltConfig", "AutoModel"):
        change(saved / "config.json", architectures=[name])
        with pytest.raises(ValueError, match=rf"names the model class \['{name}'\]"):
            pumer.load(saved)


def test_model_classes_by_name():
    assert model_class("ViltForVisualEntailment") is ViltForVisualEntailment
    assert model_class("BertModel") is BertModel
    for kind in tiny.TWO_STREAMS:
        assert model_class(kind).__name__ == kind
    for name in ("MyVilt", "ViltConfig", "AutoModel", ""):
        with pytest.raises(
            ValueError, match=f"neither transformers nor pumer has a model class '{name}'"
        ):
            model_class(name)


def test_code_in_a_file_is_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").unlink()
    torch.save({"classifier.3.bias": tiny.Evil()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        pumer.load(saved)
    assert not (tmp_path / "evil").exists()


# --- the entailment class ---


def test_entailment_has_a_loss_tuples_and_its_labels():
    model, inputs = tiny.model("ViltForVisualEntailment"), tiny.batch()
    labels = torch.tensor([0, 2, 1, 1])
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(output.logits, labels)
    )
    assert output.logits.shape == (4, 3)
    loss, given = model(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, output.loss)
    torch.testing.assert_close(given, output.logits)
    (states,) = model(**inputs, return_dict=False, output_hidden_states=True)[1:]
    assert len(states) == tiny.LAYERS + 1
    assert model.config.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert model.config.label2id["entailment"] == 2
    swapped = {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert ViltForVisualEntailment(tiny.config(id2label=swapped)).config.id2label == swapped


def test_a_model_of_another_family_can_be_saved(tmp_path):
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=9,
    )
    pumer.save(BertModel(config), tmp_path / "bert")
    assert isinstance(pumer.load(tmp_path / "bert"), BertModel)
