"""Published checkpoints: names of weights there and back, settings, and what is said when something
does not fit."""

import json
import os
import pickle
import sys
import types
from pathlib import Path

import matrix
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.models.vilt import modeling_vilt

import pumer
from pumer import PuMer
from pumer.hub import read_official, save_official
from pumer.hub.files import read_answers
from pumer.models.heads import LABELS
from pumer.models.vilt import published
from pumer.models.vilt.entailment import ViltForVisualEntailment

KEYS = sorted((Path(__file__).parents[1] / "data" / "parity" / "keys").glob("vilt_*.txt"))
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
    assert [file.stem for file in KEYS] == [
        "vilt_irtr",
        "vilt_nlvr2",
        "vilt_pretrain",
        "vilt_ve",
        "vilt_vqa2",
    ]


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_names_there_and_back(file):
    """With sizes a 64th of the published ones, to the bit; `position_ids` are what they always
    are."""
    state = {}
    for name, shape, dtype in shapes(file):
        small = [size // 64 if size >= 64 else size for size in shape]
        state[name] = torch.arange(shape[1])[None] if dtype == torch.int64 else torch.randn(small)
    head = published.LAYOUT.find_head(state)
    back = published.LAYOUT.from_ours(published.LAYOUT.to_ours(state), head)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype


@pytest.mark.parametrize("file", KEYS, ids=lambda file: file.stem)
def test_names_and_shapes_are_those_of_the_class(file):
    state = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in shapes(file)
    }
    kind = published.CLASSES[published.LAYOUT.find_head(state)]
    with torch.device("meta"):
        model = getattr(modeling_vilt, kind, ViltForVisualEntailment)(
            published.model_config({}, state)
        )
    converted = {name: tensor.shape for name, tensor in published.LAYOUT.to_ours(state).items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: converted[name] for name in expected} == expected
    assert {name.split(".")[0] for name in set(converted) - set(expected)} <= {"itm_score"}


def test_a_classifier_needs_its_name():
    with pytest.raises(ValueError, match="head says what the classifier is"):
        published.LAYOUT.from_ours({"classifier.0.weight": torch.ones(1)})


# --- checkpoints ---


def official(folder, task="vqa", **settings):
    """Write a checkpoint in the published layout, of a tiny model of ours; and give that model."""
    kind, head = TASKS[task]
    model = tiny.model(kind)
    if task == "pretrain":  # transformers ties these weights, the published code does not
        model.mlm_score.decoder.weight = torch.nn.Parameter(torch.randn(50, 32))
    weights = published.LAYOUT.from_ours(model.state_dict(), head)
    if head is None:
        weights |= {"itm_score.fc.weight": torch.ones(2, 32), "itm_score.fc.bias": torch.ones(2)}
    folder.mkdir()
    config = {
        "num_heads": 4,
        "num_layers": 4,
        "pos_grid": [6, 6],
        "hidden_size": 32,
        "tokenizer": "bert-base-uncased",
    }
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
    assert torch.equal(
        tiny.logits(pumer.load(tmp_path / "saved"), inputs), tiny.logits(model, inputs)
    )


def test_a_checkpoint_without_reduction_still_has_the_published_softmax(tmp_path):
    model, inputs = official(tmp_path / "model"), tiny.batch()
    stock = tiny.logits(model, inputs)
    loaded = pumer.load_official(tmp_path / "model")
    assert pumer.active(loaded).reducer == PuMer(
        prune=0, merge=0, merge_text=0, layers=(), official=True
    )
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vqa2_label2ans.json", ["no", "yes", "0", "2", "red", "1", "a b"]),
        ("vqa2_ans2label.json", {"0": 2, "1": 5, "2": 3, "a b": 6, "no": 0, "red": 4, "yes": 1}),
        (
            "vqa_dict.json",
            {"0": "no", "1": "yes", "2": "0", "3": "2", "4": "red", "5": "1", "6": "a b"},
        ),
    ],
)
def test_vocabularies_of_every_project(tmp_path, name, content):
    """Answers that are numbers themselves must not be taken for numbers of answers."""
    official(tmp_path / "vqa")
    (tmp_path / "vqa" / name).write_text(json.dumps(content))
    config = pumer.load_official(tmp_path / "vqa").config
    assert list(config.id2label.values()) == ["no", "yes", "0", "2", "red", "1", "a b"]
    assert config.label2id["1"] == 5
    # A file that is given goes before those that lie there.
    (tmp_path / "mine.json").write_text(json.dumps(list("abcdefg")))
    config = pumer.load_official(tmp_path / "vqa", answers=tmp_path / "mine.json").config
    assert config.label2id["b"] == 1


def test_vocabularies_of_numbers_alone(tmp_path):
    answers = ["3", "1", "0", "2"]
    by_answer, by_number = (
        {"3": 0, "1": 1, "0": 2, "2": 3},
        {"0": "3", "1": "1", "2": "0", "3": "2"},
    )
    for content in (answers, by_answer, by_number):
        (tmp_path / "answers.json").write_text(json.dumps(content))
        assert read_answers(tmp_path / "answers.json") == answers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["yes"]', "the vocabulary has 1 answers, the weights 7"),
        ("[", "cannot be read"),
        ("{}", "each once"),
        ("5", "each once"),
        ('["a", "a", "c", "d", "e", "f", "g"]', "each once"),
        ('{"a": 1, "b": 2}', "each once"),
        ('{"a": 0, "b": 0}', "each once"),
        ('{"0": "a", "2": "b"}', "each once"),
        ('{"0": "a", "1": 1}', "each once"),
    ],
)
def test_vocabularies_that_are_damaged(tmp_path, content, message):
    official(tmp_path / "vqa")
    (tmp_path / "vqa" / "vqa2_label2ans.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        pumer.load_official(tmp_path / "vqa")


def test_vocabularies_that_contradict_each_other(tmp_path):
    official(tmp_path / "vqa")
    (tmp_path / "vqa" / "vqa2_label2ans.json").write_text(json.dumps(list("abcdefg")))
    ids = {answer: number for number, answer in enumerate("abcdefg")}
    (tmp_path / "vqa" / "vqa2_ans2label.json").write_text(json.dumps(ids))
    assert pumer.load_official(tmp_path / "vqa").config.id2label[6] == "g"
    (tmp_path / "vqa" / "vqa2_ans2label.json").write_text(json.dumps(ids | {"a": 1, "b": 0}))
    with pytest.raises(ValueError, match="number the answers differently"):
        pumer.load_official(tmp_path / "vqa")
    official(tmp_path / "ve", "ve")
    with pytest.raises(ValueError, match="answers are for question answering"):
        pumer.load_official(tmp_path / "ve", answers=tmp_path / "vqa" / "vqa2_label2ans.json")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"layers": ()}),
        (
            {"sim_method": "first_head", "merge_style": "tip", "reduce_layers": None, "merge_r": 0},
            {"layers": ()},
        ),
        (REDUCED, EXPECTED),
        (REDUCED | {"sim_method": "fh"}, EXPECTED | {"score": "first_head"}),
        (REDUCED | {"sim_method": "km", "prune": 0.2}, EXPECTED | {"score": "k_metric"}),
        (
            {
                "prune": 0.2,
                "merge_image": 0.3,
                "reduce_layers": [1],
                "score": "first_head",
                "style": "diff",
            },
            {"prune": 0.2, "merge": 0.3, "layers": (1,), "score": "first_head", "style": "diff"},
        ),
        ({"merge_r": 0.3, "reduce_layers": [1]}, {"merge": 0.3, "layers": (1,)}),
        ({"merge_r": 0.3}, {"layers": ()}),
        ({"merge_r": 5}, {"merge": 5, "layers": "all"}),
    ],
)
def test_settings(settings, expected):
    nothing = {"prune": 0, "merge": 0, "merge_text": 0}
    assert published.reducer(settings) == PuMer(official=True, **(nothing | expected))


def test_settings_of_what_was_never_published():
    ours = {"official": False}
    assert published.reducer(ours) is None
    nothing = PuMer(prune=0, merge=0, merge_text=0, layers=())
    assert (
        published.reducer(ours | {"prune_r": 0, "merge_r": 0, "merge_text": 0, "reduce_layers": []})
        == nothing
    )
    assert published.reducer(ours | REDUCED) == PuMer(**EXPECTED)
    with pytest.raises(ValueError, match="official in config"):
        published.reducer({"official": "no"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_r": 0.1}, "no reduce_layers: name them"),
        (REDUCED | {"prune": 0.3}, "prune_r and prune in config.json contradict"),
        (REDUCED | {"merge_r": "lots"}, "merge_r in config.json is a number"),
        (REDUCED | {"reduce_layers": "2,5,8"}, "reduce_layers in config.json is a list"),
        (REDUCED | {"reduce_layers": ["2"]}, "reduce_layers in config.json is a list"),
        (REDUCED | {"reduce_layers": [2, 40]}, r"reduces in layers \[40\]"),
        (REDUCED | {"sim_method": "guess"}, "score is one of"),
        (REDUCED | {"merge_style": "guess"}, "style is one of"),
        ({"prune_layers": [1, 3], "keep_ratio": 0.5}, r"missing: 1\.layers\.0\.bias"),
        ({"prune_layers": [1], "prune_method": "all_heads"}, "load_official supports mlp_states"),
        ({"prune_layers": 1}, "prune_layers in config.json is a list of numbers"),
        ({"prune_layers": [1], "keep_ratio": "half"}, "keep_ratio in config.json is a number"),
        ({"num_heads": 5}, "num_heads in config.json is a divisor of the width 32"),
        (
            {"num_layers": 5},
            r"missing: vilt\.transformer\.blocks\.4\.attn\.proj\.bias, .*blocks\.4\.norm2\.weight",
        ),
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
    with pytest.warns(
        UserWarning, match=r"unused weights in .*: itm_score\.fc\.bias, itm_score\.fc\.weight"
    ):
        pumer.load_official(tmp_path / "model")


def test_weights_that_are_missing_or_have_wrong_shapes_are_named(tmp_path):
    official(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    broken = weights | {"vilt.pooler.dense.bias": torch.ones(3)}
    del broken["vilt.transformer.blocks.2.norm1.weight"]
    save_file(broken, file)
    message = (
        r"missing: vilt\.transformer\.blocks\.2\.norm1\.weight; wrong shapes: "
        r"vilt\.pooler\.dense\.bias is \[3\]"
    )
    with pytest.raises(ValueError, match=message):
        pumer.load_official(tmp_path / "model")
    for gone in (
        "vilt.text_embeddings.word_embeddings.weight",
        "vilt.transformer.patch_embed.proj.weight",
    ):
        save_file({name: tensor for name, tensor in weights.items() if name != gone}, file)
        with pytest.raises(ValueError, match=f"{gone} is missing"):
            pumer.load_official(tmp_path / "model")
    save_file({name: tensor for name, tensor in weights.items() if "classifier" not in name}, file)
    with pytest.raises(ValueError, match="no head that is known: vqa_classifier, "):
        pumer.load_official(tmp_path / "model")


# --- the way back ---


@pytest.mark.filterwarnings("ignore:weights in")
@pytest.mark.parametrize("task", TASKS)
def test_the_way_back(tmp_path, task):
    official(tmp_path / "model", task, **REDUCED, drop_rate=0.3)
    loaded = pumer.load_official(tmp_path / "model")
    save_official(loaded, tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert set(before) - set(after) == (
        {"itm_score.fc.weight", "itm_score.fc.bias"} if task in ("irtr", "pretrain") else set()
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    again = pumer.load_official(tmp_path / "back")
    inputs = tiny.batch(type(loaded).__name__)
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(loaded, inputs))
    assert pumer.active(again).reducer == pumer.active(loaded).reducer
    assert again.vilt.embeddings.text_embeddings.dropout.p == 0.3
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings | REDUCED == settings
    assert "official" not in settings
    assert sorted(os.listdir(tmp_path)) == ["back", "model"]


def test_answers_go_back_too(tmp_path):
    names = {
        "id2label": dict(enumerate("gfedcba")),
        "label2id": {name: n for n, name in enumerate("gfedcba")},
    }
    model = pumer.apply(tiny.model(**names), matrix.OFFICIAL)
    save_official(model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "vqa2_ans2label.json").read_text())["g"] == 0
    assert pumer.load_official(tmp_path / "back").config.id2label == names["id2label"]


def test_reduction_that_is_ours_goes_back_with_a_word(tmp_path):
    for reducer in (matrix.REDUCERS["pumer"], PuMer(prune=0, merge=0, merge_text=0, layers=())):
        model = pumer.apply(tiny.model(), reducer)
        with pytest.warns(UserWarning, match="ignores official in config"):
            save_official(model, tmp_path / str(reducer.prune))
        again = pumer.load_official(tmp_path / str(reducer.prune))
        assert pumer.active(again).reducer == reducer
        assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(model, tiny.batch()))
    with pytest.warns(UserWarning, match="ignores official"):
        save_official(tiny.model(), tmp_path / "stock")
    assert pumer.active(pumer.load_official(tmp_path / "stock")) is None


def test_what_cannot_go_back(tmp_path):
    swapped = {"id2label": dict(enumerate(reversed(LABELS)))}
    for model, message in (
        (
            pumer.apply(tiny.model(), matrix.REDUCERS["tome"]),
            "does not support tome: pumer.remove it",
        ),
        (tiny.model("ViltModel"), "does not support ViltModel, only ViltForQuestionAnswering"),
        (tiny.model(hidden_act="relu"), "the published ViLT has hidden_act 'gelu', not 'relu'"),
        (
            tiny.model("ViltForVisualEntailment", **swapped),
            "has the classes in the order contradiction",
        ),
        (torch.nn.Linear(1, 1), "does not support Linear, only ViLT and METER"),
    ):
        with pytest.raises(ValueError, match=message):
            save_official(model, tmp_path / "back")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="not an empty folder"):
        save_official(pumer.apply(tiny.model(), matrix.OFFICIAL), tmp_path)


# --- new heads and sizes ---


@pytest.mark.filterwarnings("ignore:weights in")
def test_a_start_from_pretraining(tmp_path):
    official(tmp_path / "model", "pretrain")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    two = pumer.load_official(tmp_path / "model", kind="ViltForImagesAndTextClassification")
    kinds = two.vilt.embeddings.token_type_embeddings.weight
    assert torch.equal(kinds, weights["vilt.token_type_embeddings.weight"][[0, 1, 1]])
    assert two.config.id2label == {0: "False", 1: "True"}
    ranks = pumer.load_official(tmp_path / "model", kind="ViltForImageAndTextRetrieval")
    assert torch.equal(ranks.rank_output.weight, weights["itm_score.fc.weight"][1:])
    entails = read_official(tmp_path / "model", kind="ViltForVisualEntailment")
    assert entails.model.num_labels == 3
    assert entails.new == tuple(
        f"ve_classifier.{n}.{part}" for n in (0, 1, 3) for part in ("bias", "weight")
    )
    assert "mlm_score.bias" in entails.left_out
    with pytest.raises(ValueError, match="needs its answers"):
        pumer.load_official(tmp_path / "model", kind="ViltForQuestionAnswering")
    (tmp_path / "answers.json").write_text('["no", "yes"]')
    answers = pumer.load_official(
        tmp_path / "model", kind="ViltForQuestionAnswering", answers=tmp_path / "answers.json"
    )
    assert answers.config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(ValueError, match="does not support ViltModel"):
        pumer.load_official(tmp_path / "model", kind="ViltModel")


def test_pictures_of_another_size_have_whole_patches(tmp_path):
    official(tmp_path / "model")
    inputs = tiny.batch()
    expected = tiny.logits(pumer.load_official(tmp_path / "model"), inputs)
    assert torch.equal(
        tiny.logits(pumer.load_official(tmp_path / "model", image_size=64), inputs), expected
    )
    with pytest.raises(ValueError, match="image_size 100 is no multiple of the patches' 16 pixels"):
        pumer.load_official(tmp_path / "model", 100)


# --- transformers' own folders ---


@pytest.mark.parametrize("kind", ["ViltForQuestionAnswering", "ViltModel"])
def test_stock_folders(tmp_path, kind):
    model = tiny.model(kind)
    model.save_pretrained(tmp_path / "model")
    loaded = pumer.load_official(tmp_path / "model", 64)
    assert type(loaded) is type(model)
    assert pumer.active(loaded) is None
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )
    weights = load_file(tmp_path / "model" / "model.safetensors")
    odd = weights | {"spare": torch.ones(2)}
    save_file(odd, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="unused weights in .*: spare"):
        pumer.load_official(tmp_path / "model")
    gone = next(name for name in weights if name.endswith("pooler.dense.bias"))
    weights.pop(gone)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing: {gone}"):
        pumer.load_official(tmp_path / "model")
    save_file(
        weights | {gone: torch.ones(32)}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="no multiple of the patches"):
        pumer.load_official(tmp_path / "model", 50)


def test_answers_of_stock_folders(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "answers.json").write_text(json.dumps(list("abcdefg")))
    loaded = pumer.load_official(tmp_path / "model", answers=tmp_path / "answers.json")
    assert loaded.config.id2label[6] == "g"
    assert not read_official(tmp_path / "model").answers
    (tmp_path / "answers.json").write_text('["a"]')
    with pytest.raises(ValueError, match="the vocabulary has 1 answers, the model 7"):
        pumer.load_official(tmp_path / "model", answers=tmp_path / "answers.json")


def test_folders_of_pumer_save_are_not_mistaken(tmp_path):
    pumer.save(tiny.model(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"read it with pumer\.load"):
        pumer.load_official(tmp_path / "model")


# --- original checkpoints ---


def lightning(folder, **others):
    """An original ViLT checkpoint of a tiny model, and the model; Lightning's own classes stand for
    its callbacks."""
    model = official(folder)
    weights = load_file(folder / "model.safetensors")
    state = {name.removeprefix("vilt."): tensor for name, tensor in weights.items()}
    made_with = {
        "config": {"num_heads": 4, "pos_grid": [6, 6], "exp_name": "finetune", "batch_size": 4096}
    }
    torch.save(
        {"state_dict": state, "epoch": 3, "hyper_parameters": made_with} | others,
        folder / "vilt.ckpt",
    )
    return model


def test_an_original_checkpoint(tmp_path):
    model, inputs = lightning(tmp_path / "model"), tiny.batch()
    file = tmp_path / "model" / "vilt.ckpt"
    # PuMer's answers have another order.
    (tmp_path / "model" / "vqa2_label2ans.json").write_text(json.dumps(list("abcdefg")))
    loaded = pumer.load_official(file)
    assert pumer.active(loaded) is None
    assert loaded.config.id2label[0] == "LABEL_0"
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )
    (tmp_path / "model" / "vqa_dict.json").write_text(
        json.dumps({str(n): name for n, name in enumerate("gfedcba")})
    )
    assert pumer.load_official(file).config.id2label[0] == "g"
    pumer.apply(loaded, matrix.OFFICIAL)
    pumer.apply(model, matrix.OFFICIAL)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


@pytest.fixture
def lightning_classes(monkeypatch):
    """Lightning's classes, for as long as a checkpoint is written."""
    module = types.ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    for kind in (ModelCheckpoint, AttributeDict):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    for name in ("pytorch_lightning", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_what_lightning_keeps_besides_is_not_needed(tmp_path, lightning_classes, monkeypatch):
    others = {
        "callbacks": {
            lightning_classes.ModelCheckpoint: {"best": 0.5},
            "made": lightning_classes.ModelCheckpoint(),
        },
        "hyper_parameters": lightning_classes.AttributeDict(
            config={"num_heads": 4, "pos_grid": [6, 6]}
        ),
    }
    lightning(tmp_path / "model", **others)
    monkeypatch.delitem(sys.modules, lightning_classes.__name__)
    assert pumer.load_official(tmp_path / "model" / "vilt.ckpt").config.num_attention_heads == 4


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_original_checkpoints_that_are_damaged_or_hold_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lightning(tmp_path / "model")
    file = tmp_path / "model" / "vilt.ckpt"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"vilt\.ckpt is damaged"):
            pumer.load_official(file)
    lightning(tmp_path / "evil", callbacks=tiny.Evil())
    with pytest.raises(ValueError, match="pickled code, which is never run"):
        pumer.load_official(tmp_path / "evil" / "vilt.ckpt")
    file.write_bytes(pickle.dumps(tiny.Evil()))
    with pytest.raises(ValueError, match="damaged, or holds pickled code"):
        pumer.load_official(file)
    assert not (tmp_path / "evil" / "evil").exists()
    assert sorted(os.listdir(tmp_path)) == ["evil", "model"]
    for content, message in (
        ([1], "no Lightning checkpoint"),
        ({"epoch": 1}, "no Lightning checkpoint, it has no state_dict"),
        ({"state_dict": {"a": 1}}, "something else than named weights"),
        ({"state_dict": {"a": torch.ones(1)}}, "neither the original ViLT's nor METER's"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            pumer.load_official(file)
    with pytest.raises(ValueError, match=r"there is no .*nothing\.ckpt"):
        pumer.load_official(tmp_path / "nothing.ckpt")


# --- files ---


def test_weights_of_another_family_are_not_mistaken(tmp_path):
    official(tmp_path / "model")
    save_file({"bert.pooler.dense.weight": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"neither ViLT's nor METER's: bert\.pooler"):
        pumer.load_official(tmp_path / "model")


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
