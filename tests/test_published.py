"""Published checkpoints: names of weights there and back, settings, and what is said when something does not fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.vilt import modeling_vilt

import matrix
import pumer
import tiny
from pumer import PuMer
from pumer.models.vilt import published
from pumer.models.vilt.entailment import LABELS, ViltForVisualEntailment

KEYS = sorted((Path(__file__).parent / "data" / "parity" / "keys").glob("vilt_*.txt"))
TASKS = {
    "vqa": ("ViltForQuestionAnswering", "vqa_classifier"),
    "nlvr2": ("ViltForImagesAndTextClassification", "nlvr2_classifier"),
    "ve": ("ViltForVisualEntailment", "ve_classifier"),
    "irtr": ("ViltForImageAndTextRetrieval", None),
    "pretrain": ("ViltForMaskedLM", None),
}
REDUCED = {"prune_r": 0.2, "merge_r": 0.3, "merge_text": 0.3, "reduce_layers": [1, 2]}
EXPECTED = {"prune": 0.2, "merge": 0.3, "merge_text": 0.3, "layers": (1, 2)}


# --- names of weights ---


def shapes(file):
    """Names, shapes and dtypes of a published checkpoint's weights."""
    for line in file.read_text().splitlines():
        name, shape, dtype = line.split("\t")
        yield name, json.loads(shape), getattr(torch, dtype.removeprefix("torch."))


def test_there_are_names_to_check():
    assert [file.stem for file in KEYS] == ["vilt_irtr", "vilt_nlvr2", "vilt_pretrain", "vilt_ve", "vilt_vqa2"]


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_names_there_and_back(file):
    """With sizes a 64th of the published ones, to the bit; `position_ids` are what they always are."""
    state = {}
    for name, shape, dtype in shapes(file):
        small = [size // 64 if size >= 64 else size for size in shape]
        state[name] = torch.arange(shape[1])[None] if dtype == torch.int64 else torch.randn(small)
    head = published.find_head(state)
    back = published.from_transformers(published.to_transformers(state), head)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_names_and_shapes_are_those_of_the_class(file):
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in shapes(file)}
    kind = published.CLASSES[published.find_head(state)]
    with torch.device("meta"):
        model = getattr(modeling_vilt, kind, ViltForVisualEntailment)(published.model_config({}, state))
    converted = {name: tensor.shape for name, tensor in published.to_transformers(state).items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: converted[name] for name in expected} == expected
    assert {name.split(".")[0] for name in set(converted) - set(expected)} <= {"itm_score"}


def test_a_classifier_needs_its_name():
    with pytest.raises(ValueError, match="head says what the classifier is"):
        published.from_transformers({"classifier.0.weight": torch.ones(1)})


# --- checkpoints ---


def official(folder, task="vqa", **settings):
    """Write a checkpoint in the published layout, of a tiny model of ours; and give that model."""
    kind, head = TASKS[task]
    model = tiny.model(kind)
    if task == "pretrain":  # transformers ties these weights, the published code does not
        model.mlm_score.decoder.weight = torch.nn.Parameter(torch.randn(50, 32))
    weights = published.from_transformers(model.state_dict(), head)
    if head is None:
        weights |= {"itm_score.fc.weight": torch.ones(2, 32), "itm_score.fc.bias": torch.ones(2)}
    folder.mkdir()
    config = {"num_heads": 4, "num_layers": 4, "pos_grid": [6, 6], "hidden_size": 32, "tokenizer": "bert-base-uncased"}
    (folder / "config.json").write_text(json.dumps(config | settings))
    save_file(weights, folder / "model.safetensors")
    return model


@pytest.mark.filterwarnings("ignore:weights in")
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_is_the_model_with_the_official_reduction(tmp_path, task):
    model = official(tmp_path / "model", task, **REDUCED, sim_method="mh", merge_style="tome")
    pumer.apply(model, matrix.OFFICIAL)
    loaded = pumer.load_official(str(tmp_path / "model"))
    assert type(loaded) is type(model)
    assert pumer.active(loaded).reducer == matrix.OFFICIAL
    inputs = tiny.batch(type(model).__name__)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    assert not loaded.training
    # And from there on it is a model like any other.
    pumer.save(loaded, tmp_path / "saved")
    assert torch.equal(tiny.logits(pumer.load(tmp_path / "saved"), inputs), tiny.logits(model, inputs))


def test_a_checkpoint_without_reduction_still_has_the_published_softmax(tmp_path):
    model, inputs = official(tmp_path / "model"), tiny.batch()
    stock = tiny.logits(model, inputs)
    loaded = pumer.load_official(tmp_path / "model")
    assert pumer.active(loaded).reducer == PuMer(prune=0, merge=0, merge_text=0, layers=(), official=True)
    found = tiny.logits(loaded, inputs)
    assert not torch.equal(found, stock)
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-3)
    assert loaded.vilt.encoder.layer[0].layernorm_before.eps == 1e-6
    assert pumer.remove(loaded).vilt.encoder.layer[0].layernorm_before.eps == 1e-12


def test_labels(tmp_path):
    official(tmp_path / "ve", "ve")
    assert pumer.load_official(tmp_path / "ve").config.id2label == dict(enumerate(LABELS))
    official(tmp_path / "nlvr2", "nlvr2")
    assert pumer.load_official(tmp_path / "nlvr2").config.id2label == {0: "False", 1: "True"}
    official(tmp_path / "vqa")
    assert pumer.load_official(tmp_path / "vqa").config.num_labels == 7
    answers = tmp_path / "vqa" / "vqa2_label2ans.json"
    answers.write_text(json.dumps(list("abcdefg")))
    config = pumer.load_official(tmp_path / "vqa").config
    assert (config.id2label[6], config.label2id["b"]) == ("g", 1)
    for content, message in (('["yes"]', "list of the 7 answers"), ("[", "cannot be read"), ("{}", "list of the 7")):
        answers.write_text(content)
        with pytest.raises(ValueError, match=message):
            pumer.load_official(tmp_path / "vqa")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"layers": ()}),
        ({"sim_method": "first_head", "merge_style": "tip", "reduce_layers": None, "merge_r": 0}, {"layers": ()}),
        (REDUCED, EXPECTED),
        (REDUCED | {"sim_method": "fh"}, EXPECTED | {"score": "first_head"}),
        (REDUCED | {"sim_method": "km", "prune": 0.2}, EXPECTED | {"score": "k_metric"}),
        (
            {"prune": 0.2, "merge_image": 0.3, "reduce_layers": [1], "score": "first_head", "style": "diff"},
            {"prune": 0.2, "merge": 0.3, "layers": (1,), "score": "first_head", "style": "diff"},
        ),
        ({"merge_r": 0.3, "reduce_layers": [1]}, {"merge": 0.3, "layers": (1,)}),
        ({"merge_r": 0.3}, {"layers": ()}),
        ({"merge_r": 5}, {"merge": 5, "layers": None}),
    ],
)
def test_settings(settings, expected):
    nothing = {"prune": 0, "merge": 0, "merge_text": 0}
    assert published.reducer(settings) == PuMer(official=True, **(nothing | expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_r": 0.1}, "no reduce_layers: name them"),
        (REDUCED | {"prune": 0.3}, "prune_r and prune in config.json contradict"),
        (REDUCED | {"merge_r": "lots"}, "merge_r in config.json is a number"),
        (REDUCED | {"reduce_layers": "2,5,8"}, "reduce_layers in config.json is a list"),
        (REDUCED | {"reduce_layers": [2, 40]}, r"reduces in layers \[40\]"),
        (REDUCED | {"sim_method": "guess"}, "score is one of"),
        (REDUCED | {"merge_style": "guess"}, "style is one of"),
        ({"prune_layers": [1, 3], "keep_ratio": 0.5}, "learned predictors .* does not support yet"),
        ({"num_heads": 5}, "num_heads in config.json is a divisor of the width 32"),
        ({"num_layers": 5}, r"missing: vilt\.transformer\.blocks\.4\.attn\.proj\.bias, .*blocks\.4\.norm2\.weight"),
        ({"num_layers": "many"}, "num_layers in config.json is a whole number"),
        ({"pos_grid": [3, 12]}, "pos_grid in config.json is two equal numbers"),
        ({"pos_grid": [12, 12]}, r"pos_embed is \[1, 37, 32\], not \[1, 145, 32\].*pos_grid"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    official(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match=message):
        pumer.load_official(tmp_path / "model")


def test_unknown_settings_are_named_and_ignored(tmp_path):
    official(tmp_path / "model", colour="red", ib_kl=False)
    with pytest.warns(UserWarning, match="unknown and ignored: colour$"):
        pumer.load_official(tmp_path / "model")


def test_the_matching_head_of_retrieval_is_left_out_with_a_word(tmp_path):
    official(tmp_path / "model", "irtr")
    with pytest.warns(UserWarning, match=r"left out: itm_score\.fc\.bias, itm_score\.fc\.weight"):
        pumer.load_official(tmp_path / "model")


def test_weights_that_are_missing_or_have_wrong_shapes_are_named(tmp_path):
    official(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    broken = weights | {"vilt.pooler.dense.bias": torch.ones(3)}
    del broken["vilt.transformer.blocks.2.norm1.weight"]
    save_file(broken, file)
    message = r"missing: vilt\.transformer\.blocks\.2\.norm1\.weight; wrong shapes: vilt\.pooler\.dense\.bias is \[3\]"
    with pytest.raises(ValueError, match=message):
        pumer.load_official(tmp_path / "model")
    for gone in ("vilt.text_embeddings.word_embeddings.weight", "vilt.transformer.patch_embed.proj.weight"):
        save_file({name: tensor for name, tensor in weights.items() if name != gone}, file)
        with pytest.raises(ValueError, match=f"{gone} is missing"):
            pumer.load_official(tmp_path / "model")
    save_file({name: tensor for name, tensor in weights.items() if "classifier" not in name}, file)
    with pytest.raises(ValueError, match="no head that is known: vqa_classifier, "):
        pumer.load_official(tmp_path / "model")
    save_file(weights | {"vilt.token_pruner.token_predictors.1.0.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="learned predictors"):
        pumer.load_official(tmp_path / "model")


# --- files ---


def test_weights_may_come_from_torch(tmp_path):
    official(tmp_path / "model", **REDUCED)
    folder, inputs = tmp_path / "model", tiny.batch()
    expected = tiny.logits(pumer.load_official(folder), inputs)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        pumer.load_official(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(tiny.logits(pumer.load_official(folder), inputs), expected)
    torch.save({"state_dict": weights}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something else than named weights"):
        pumer.load_official(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_and_code_are_refused(tmp_path, monkeypatch):
    official(tmp_path / "model")
    folder = tmp_path / "model"
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
            pumer.load_official(folder)

    monkeypatch.chdir(tmp_path)
    torch.save({"vilt.pooler.dense.bias": tiny.Evil()}, file)
    with pytest.raises(ValueError, match="pickled code, which is never run"):
        pumer.load_official(folder)
    file.write_bytes(pickle.dumps(tiny.Evil()))
    with pytest.raises(ValueError, match="damaged, or holds pickled code"):
        pumer.load_official(folder)
    assert not (tmp_path / "evil").exists()

    (folder / "model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        pumer.load_official(folder)
    (folder / "config.json").write_text("...")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        pumer.load_official(folder)
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        pumer.load_official(tmp_path / "nowhere")
