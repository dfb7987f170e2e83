"""Published METER checkpoints: names of weights there and back, settings, sizes, and the
originals."""

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import pumer
from pumer import PuMer
from pumer.hub import read_official, save_official
from pumer.models import meter
from pumer.models.meter import published
from pumer.models.meter.resize import resize_positions

TASKS = ["irtr", "nlvr2", "pretrain", "ve", "vqa2"]
KINDS = list(published.CLASSES.values())
REDUCED = {"prune_r": 0.2, "merge_r": 0.3, "merge_text": 0.3, "reduce_layers": [2, 4]}
RATIOS = {"prune": 0.2, "merge": 0.3, "merge_text": 0.3}
OFFICIAL = PuMer(**RATIOS, layers=(1, 2), official="meter")
POSITIONS = "meter.vit_model.positional_embedding"


# --- names of weights ---


@pytest.fixture(params=TASKS)
def state(request, shared):
    """Names and shapes of a published checkpoint's weights."""
    state = {}
    for line in (
        (shared / "parity" / "keys" / f"meter_{request.param}.txt").read_text().splitlines()
    ):
        name, shape, dtype = line.split("\t")
        state[name] = torch.empty(
            json.loads(shape), dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta"
        )
    return state


def test_names_and_shapes_are_those_of_the_class(state):
    kind = published.CLASSES[published.LAYOUT.find_head(state)]
    config = published.model_config({}, state)
    with torch.device("meta"):
        model = getattr(meter, kind)(config)
    converted = {name: tensor.shape for name, tensor in published.LAYOUT.to_ours(state).items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: converted[name] for name in expected} == expected
    left = {name.split(".")[0] for name in set(converted) - set(expected)}
    assert left <= ({"itm_score"} if kind == "MeterForMaskedLM" else set())
    # What does not show in the weights is as in the published code.
    text, vision = config.text_config, config.vision_config
    assert (text.num_attention_heads, vision.num_attention_heads, config.num_attention_heads) == (
        12,
        12,
        12,
    )
    assert (text.num_hidden_layers, vision.num_hidden_layers, config.num_hidden_layers) == (
        12,
        11,
        6,
    )
    assert (text.layer_norm_eps, vision.layer_norm_eps, config.layer_norm_eps) == (
        1e-5,
        1e-5,
        1e-12,
    )
    assert (text.hidden_act, vision.hidden_act, config.hidden_act) == ("gelu", "quick_gelu", "gelu")
    assert (config.update, config.image_size, config.max_position_embeddings) == (
        "sequential",
        384,
        512,
    )


def test_names_there_and_back(state):
    """With sizes a 64th of the published ones, to the bit."""
    small = {}
    for name, tensor in state.items():
        sizes = [size // 64 if size >= 64 else size for size in tensor.shape]
        small[name] = (
            torch.arange(sizes[1])[None] if tensor.dtype == torch.int64 else torch.randn(sizes)
        )
    back = published.LAYOUT.from_ours(
        published.LAYOUT.to_ours(small), published.LAYOUT.find_head(small)
    )
    assert set(back) == set(small)
    for name, tensor in small.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    with pytest.raises(ValueError, match="head says what the classifier is"):
        published.LAYOUT.from_ours({"classifier.0.weight": torch.ones(1)})


@pytest.mark.parametrize("task", ["irtr", "nlvr2", "ve", "vqa2"])
def test_weights_of_the_reference_models_there_and_back(shared, tmp_path, task):
    data = load_file(shared / "parity" / f"meter_{task}.safetensors")
    settings = json.loads((shared / "parity" / f"meter_{task}.json").read_text())
    weights = {
        name.removeprefix("weights."): x for name, x in data.items() if name.startswith("weights.")
    }
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    sizes = {**settings["config"], **settings["extra"], **REDUCED}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    model = pumer.load_official(tmp_path / "model")
    save_official(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert model.config.to_dict() == pumer.load_official(tmp_path / "back").config.to_dict()


# --- checkpoints ---


def official(folder, kind="MeterForQuestionAnswering", **settings):
    """Write a checkpoint in the published layout, of a tiny model of ours; and give that model."""
    model = tiny.model(kind, update="sequential")
    save_official(pumer.apply(model, OFFICIAL), folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("prune_r", "merge_r", "merge_text", "reduce_layers"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | settings))
    return pumer.remove(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_model_with_the_official_reduction(tmp_path, kind):
    model = pumer.apply(official(tmp_path / "model", kind, **REDUCED), OFFICIAL)
    loaded = pumer.load_official(tmp_path / "model")
    assert type(loaded) is type(model)
    assert pumer.active(loaded).reducer == OFFICIAL
    inputs = tiny.batch(kind)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    assert not loaded.training
    if kind == "MeterForImageAndTextRetrieval":
        assert torch.equal(loaded.itm_score.weight, model.itm_score.weight)
    pumer.save(loaded, tmp_path / "saved")
    assert torch.equal(
        tiny.logits(pumer.load(tmp_path / "saved"), inputs), tiny.logits(model, inputs)
    )
    save_official(loaded, tmp_path / "back")
    again = pumer.load_official(tmp_path / "back")
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(model, inputs))
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings | REDUCED == settings
    assert not {"official", "update"} & set(settings)


def test_a_checkpoint_without_reduction_still_has_the_published_softmax(tmp_path):
    model = official(tmp_path / "model")
    loaded = pumer.load_official(tmp_path / "model")
    nothing = PuMer(prune=0, merge=0, merge_text=0, layers=(), official="meter")
    assert pumer.active(loaded).reducer == nothing
    inputs = tiny.batch("MeterForQuestionAnswering")
    assert not torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    assert torch.equal(
        tiny.logits(loaded, inputs), tiny.logits(pumer.apply(model, nothing), inputs)
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"layers": ()}),
        (REDUCED, RATIOS | {"layers": (1, 2)}),
        (REDUCED | {"reduce_layers": [0, 2, 4, 6]}, RATIOS | {"layers": (0, 1, 2, 3)}),
        (REDUCED | {"reduce_layers": [1, 2, 3]}, RATIOS | {"layers": (1,)}),
        (REDUCED | {"reduce_layers": [1, 3]}, {"layers": ()}),
        (REDUCED | {"sim_method": "fh", "merge_style": "tip"}, RATIOS | {"layers": (1, 2)}),
        ({"merge_r": 0.3, "reduce_layers": [0]}, {"layers": ()}),
        ({"merge_r": 5}, {"layers": ()}),
    ],
)
def test_settings(settings, expected):
    nothing = {"prune": 0, "merge": 0, "merge_text": 0}
    assert published.reducer(settings) == PuMer(official="meter", **(nothing | expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_r": 0.1}, "no reduce_layers: name them"),
        (REDUCED | {"reduce_layers": [40]}, r"reduces in layers \[20\]"),
        (REDUCED | {"prune": 0.3}, "contradict each other"),
        ({"prune_layers": [2]}, r"missing: 0\.layers\.0\.bias"),
        ({"num_heads": 5}, "num_heads in config.json is a divisor of the width 32"),
        ({"image_encoder": {"heads": 5}}, "heads in config.json is a divisor of the width 48"),
        ({"text_encoder": 3}, "text_encoder in config.json is an object"),
        (
            {"text_encoder": {"layers": 3, "heads": 2}},
            r"missing: meter\.text_transformer\.encoder\.layer\.2\.",
        ),
        (
            {"image_encoder": {"blocks": 4, "heads": 3}},
            r"missing: meter\.vit_model\.transformer\.resblocks\.3\.",
        ),
        ({"num_top_layer": 5}, r"missing: meter\.cross_modal_image_layers\.4\."),
        (
            {"image_size": 128},
            r"positional_embedding is \[37, 48\], not \[65, 48\].*give another one to "
            r"load_official",
        ),
        ({"image_size": "big"}, "image_size in config.json is a whole number"),
        ({"update": "never"}, "update is 'parallel' or 'sequential'"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    official(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match=message):
        pumer.load_official(tmp_path / "model")


def test_unknown_settings_are_named_and_ignored(tmp_path):
    official(tmp_path / "model", colour="red", input_image_embed_size=768)
    with pytest.warns(UserWarning, match="unknown and ignored: colour$"):
        pumer.load_official(tmp_path / "model")


def test_weights_that_do_not_fit_are_named(tmp_path):
    official(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    broken = weights | {"meter.vit_model.ln_post.bias": torch.ones(3), "meter.spare": torch.ones(1)}
    del broken["meter.cross_modal_text_layers.2.crossattention.self.key.weight"]
    save_file(broken, file)
    message = (
        r"missing: meter\.cross_modal_text_layers\.2\.crossattention\.self\.key\.weight; wrong "
        r"shapes: "
    )
    with pytest.raises(
        ValueError, match=message + r"meter\.vit_model\.ln_post\.bias is \[3\], not \[48\]"
    ):
        pumer.load_official(tmp_path / "model")
    save_file(weights | {"meter.spare": torch.ones(1)}, file)
    with pytest.warns(UserWarning, match=r"unused weights in .*: meter\.spare$"):
        pumer.load_official(tmp_path / "model")
    for gone in ("meter.vit_model.conv1.weight", POSITIONS, "meter.token_type_embeddings.weight"):
        save_file({name: tensor for name, tensor in weights.items() if name != gone}, file)
        with pytest.raises(
            ValueError, match=f"{gone} is missing: these are not the weights of a published meter"
        ):
            pumer.load_official(tmp_path / "model")
    # The name of another model in front of them makes them no other model's.
    save_file(
        {name.replace("meter.", "vilt.", 1): tensor for name, tensor in weights.items()}, file
    )
    with pytest.raises(ValueError, match="not the weights of a published vilt checkpoint"):
        pumer.load_official(tmp_path / "model")


def test_what_cannot_go_back(tmp_path):
    for model, message in (
        (
            tiny.model("MeterModel"),
            "does not support MeterModel, only MeterForQuestionAnswering",
        ),
        (
            tiny.model("MeterForMaskedLM", hidden_dropout_prob=0.1),
            "one dropout for states and attention",
        ),
        (
            pumer.apply(tiny.model("MeterForMaskedLM"), PuMer(layers=(1,), score="qk")),
            "scores by mean_head, not by qk",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_official(model, tmp_path / "back")
    parallel = pumer.apply(tiny.model("MeterForMaskedLM"), OFFICIAL)
    with pytest.warns(UserWarning, match="ignores update in config"):
        save_official(parallel, tmp_path / "back")
    again, inputs = pumer.load_official(tmp_path / "back"), tiny.batch("MeterForMaskedLM")
    assert again.config.update == "parallel"
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(parallel, inputs))


# --- pictures of another size ---


def test_positions_for_another_size(tmp_path):
    official(tmp_path / "model", **REDUCED)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    larger = pumer.load_official(tmp_path / "model", 160)
    assert larger.config.image_size == 160
    grid = weights[POSITIONS][1:].view(6, 6, 48).permute(2, 0, 1)[None]
    grid = torch.nn.functional.interpolate(grid, size=(10, 10), mode="bicubic", align_corners=False)
    table = larger.meter.vision_model.embeddings.position_embedding.weight
    assert torch.equal(table[0], weights[POSITIONS][0])
    torch.testing.assert_close(table[1:].view(10, 10, 48).permute(2, 0, 1)[None], grid)
    # At run time the stock table is resized the same way.
    inputs = tiny.batch("MeterForQuestionAnswering", size=(160, 160))
    found, expected = (
        tiny.logits(pumer.load_official(tmp_path / "model", size), inputs) for size in (160, None)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    same = pumer.load_official(tmp_path / "model", 96)
    assert torch.equal(
        same.meter.vision_model.embeddings.position_embedding.weight, weights[POSITIONS]
    )
    for size in (100, 0):
        with pytest.raises(
            ValueError, match=f"image_size {size} is no multiple of the patches' 16 pixels"
        ):
            pumer.load_official(tmp_path / "model", size)
    assert resize_positions(torch.ones(5, 3, dtype=torch.bfloat16), 3).dtype == torch.bfloat16


# --- a start from pretraining ---


def test_a_start_from_pretraining(tmp_path):
    official(tmp_path / "model", "MeterForMaskedLM")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file(
        weights | {"itm_score.fc.weight": torch.randn(2, 64), "itm_score.fc.bias": torch.randn(2)},
        file,
    )
    two = read_official(tmp_path / "model", kind="MeterForImagesAndTextClassification")
    kinds = two.model.meter.modality_embeddings.weight
    assert torch.equal(kinds, weights["meter.token_type_embeddings.weight"][[0, 1, 1]])
    assert (two.model.config.num_images, two.model.config.id2label) == (2, {0: "False", 1: "True"})
    assert len(two.new) == 6
    assert {"mlm_score.bias", "itm_score.fc.bias"} <= set(two.left_out)
    ranks = read_official(tmp_path / "model", kind="MeterForImageAndTextRetrieval")
    assert torch.equal(ranks.model.rank_output.weight, ranks.model.itm_score.weight[1:])
    assert ranks.new == ()


# --- the originals ---


def originally(weights):
    """Published names as the original METER has them, and the weights that it never uses."""
    state = {}
    for name, tensor in weights.items():
        name = name.removeprefix("meter.").replace("vit_model.", "vit_model.visual.")
        state[name.replace("ve_classifier", "snli_classifier")] = tensor
    for name in (
        "vit_model.positional_embedding",
        "vit_model.ln_final.weight",
        "text_transformer.pooler.dense.weight",
    ):
        state[name] = torch.ones(2)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_checkpoint(tmp_path, kind):
    model = official(tmp_path / "model", kind)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    names = ("num_heads", "text_encoder", "image_encoder", "drop_rate")
    made_with = {
        "config": {name: settings[name] for name in names}
        | {"image_size": 999, "exp_name": "finetune"}
    }
    torch.save(
        {"state_dict": originally(weights), "hyper_parameters": made_with}, tmp_path / "meter.ckpt"
    )
    message = (
        r"unused weights.*: text_transformer\.pooler\.dense\.weight, vit_model\.ln_final\.weight, "
        r"vit_model\.positional"
    )
    with pytest.warns(UserWarning, match=message):
        loaded = pumer.load_official(tmp_path / "meter.ckpt")
    assert type(loaded) is type(model)
    assert pumer.active(loaded) is None
    assert (loaded.config.update, loaded.config.image_size) == ("parallel", 96)
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:weights in")
@pytest.mark.parametrize("family", ["meter", "vilt"])
@pytest.mark.parametrize("texts", ["padded", "full_text"])
def test_original_checkpoints_give_the_original_results(shared, tmp_path, family, texts):
    data = load_file(shared / "parity" / f"{family}_vqa2.safetensors")
    extra = json.loads((shared / "parity" / f"{family}_vqa2.json").read_text())["extra"]
    expected = load_file(shared / "parity" / "original_models.safetensors")
    weights = {
        name.removeprefix("weights."): x for name, x in data.items() if name.startswith("weights.")
    }
    if family == "meter":
        state = originally(weights)
    else:
        state = {name.removeprefix("vilt."): x for name, x in weights.items()}
    config = {
        "num_heads": 4,
        **{name: extra[name] for name in extra if name not in ("patch_size", "fusion")},
    }
    torch.save(
        {"state_dict": state, "hyper_parameters": {"config": config}}, tmp_path / "model.ckpt"
    )
    model = pumer.load_official(tmp_path / "model.ckpt")
    inputs = {
        "input_ids": expected[f"{family}_vqa2.{texts}.text_ids"],
        "attention_mask": expected[f"{family}_vqa2.{texts}.text_masks"],
        "pixel_values": data["inputs.pixel_values"],
    }
    found = tiny.logits(model, inputs)
    assert math.isclose(
        (found - expected[f"{family}_vqa2.{texts}.logits"]).abs().max(), 0, abs_tol=1e-4
    )
