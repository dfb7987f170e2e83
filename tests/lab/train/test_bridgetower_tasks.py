"""BridgeTower in training: from a ViLT, with a teacher, and from question answering to every other
task."""

import json

import pytest
import tiny
import torch
from test_train import IMAGE, REDUCER, STEPS, TASK, tokenizer  # noqa: F401  # fixture
from transformers import ViltForQuestionAnswering

import pumer
from pumer.hub import load
from pumer.lab.evaluate import evaluate
from pumer.lab.tasks import build
from pumer.lab.tasks.processors import saved_collator
from pumer.lab.tasks.retrieval import ranking_scores
from pumer.lab.train.run import train
from pumer.lab.train.settings import (
    DistillSettings,
    GroundingSettings,
    ModelSettings,
    TrainSettings,
)
from pumer.models.bridgetower.init import init_bridgetower_from_vilt

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 150,
    "pad_token_id": 0,
    "max_position_embeddings": 26,
}
VISION = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
CONFIG = {
    "text_config": TEXT,
    "vision_config": VISION,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OTHERS = {
    "BridgeTowerForImagesAndTextClassification": "scenes-nlvr2",
    "BridgeTowerForVisualEntailment": "scenes-ve",
    "BridgeTowerForImageAndTextRetrieval": "scenes-retrieval",
}


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("bridgetower")
    model = ModelSettings(
        kind="BridgeTowerForQuestionAnswering", tokenizer=tokenizer, config=CONFIG, max_length=24
    )
    grounding = GroundingSettings(1.0, 1)
    task = TASK | {"patch_size": 8}
    train(TrainSettings(str(out), task, model, image=IMAGE, grounding=grounding, trainer=STEPS))
    return out


def test_a_student_learns_from_its_teacher_with_the_reducer_on(base, tmp_path):
    train(
        TrainSettings(
            str(tmp_path / "out"),
            TASK,
            ModelSettings(path=str(base / "model"), max_length=24),
            reducer=REDUCER,
            distill=DistillSettings(str(base / "model")),
            trainer=STEPS,
        )
    )
    log = json.loads((tmp_path / "out/log.json").read_text())
    assert "distill_loss" in log[0]
    model = load(tmp_path / "out/model")
    assert pumer.active(model).reducer.layers == (0, 1)
    task = build(TASK, model.config.id2label.values())
    collator = saved_collator(str(tmp_path / "out/model"), model, task)
    result = evaluate(model, task.examples("val")[:8], collator, batch_size=4)
    assert 0 <= result.metric["accuracy"] <= 100


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_task_starts_from_question_answering(base, tmp_path, kind):
    task = {"name": OTHERS[kind], "questions": 16, "image_size": 32}
    if "Retrieval" in kind:
        task = {
            "name": OTHERS[kind],
            "pictures": 16,
            "questions": 16,
            "negatives": 3,
            "image_size": 32,
        }
    train(
        TrainSettings(
            str(tmp_path / "out"),
            task,
            ModelSettings(path=str(base / "model"), kind=kind, max_length=24),
            reducer=REDUCER,
            trainer=STEPS | {"max_steps": 2},
        )
    )
    model = load(tmp_path / "out/model")
    assert type(model).__name__ == kind
    if "Images" in kind:
        types = model.bridgetower.token_type_embeddings.weight
        start = load(base / "model").bridgetower.token_type_embeddings.weight
        assert types.shape == (3, 64)
        torch.testing.assert_close(types[2], start[1], rtol=0, atol=0.02)
    built = build(task)
    collator = saved_collator(str(tmp_path / "out/model"), model, built)
    result = evaluate(model, built.examples("val")[:4], collator, batch_size=2)
    assert result.examples == 4


def test_a_new_model_of_two_images_is_told_so(tokenizer, tmp_path):  # noqa: F811
    kind = "BridgeTowerForImagesAndTextClassification"
    train(
        TrainSettings(
            str(tmp_path / "out"),
            {"name": "scenes-nlvr2", "questions": 8, "image_size": 32},
            ModelSettings(kind=kind, tokenizer=tokenizer, config=CONFIG, max_length=24),
            image=IMAGE,
            trainer=STEPS | {"max_steps": 1},
        )
    )
    assert load(tmp_path / "out/model").config.num_images == 2


def test_scores_of_a_matching_head_are_yes_against_no():
    assert ranking_scores(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).tolist() == [2.0, -2.0]
    assert ranking_scores(torch.tensor([[1.0], [2.0]])).tolist() == [1.0, 2.0]


def vilt(**changes):
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "intermediate_size": 96,
        "vocab_size": 50,
        "image_size": 96,
        "hidden_act": "gelu",
    }
    return ViltForQuestionAnswering(tiny.config(**sizes | changes)).eval()


def bridgetower():
    config = tiny.bridgetower_config()
    vision = config.vision_config.to_dict() | {"hidden_size": 64}
    return tiny.model("BridgeTowerForQuestionAnswering", vision_config=vision)


def test_a_tower_from_a_vilt_does_what_its_blocks_do():
    """But for the activation: BridgeTower's is an approximation of GELU."""
    start, model = vilt(), bridgetower()
    with pytest.raises(RuntimeError):  # the words are of another width
        init_bridgetower_from_vilt(model, start)
    text = tiny.bridgetower_config().text_config.to_dict() | {"hidden_size": 64}
    vision = tiny.bridgetower_config().vision_config.to_dict() | {"hidden_size": 64}
    kind = "BridgeTowerForQuestionAnswering"
    model = tiny.model(kind, text_config=text, vision_config=vision, hidden_size=64)
    init_bridgetower_from_vilt(model, start)
    states = torch.randn(2, 9, 64)
    blocks = model.bridgetower.vision_model.visual.transformer.resblocks
    with torch.no_grad():
        for block, layer in zip(blocks, start.vilt.encoder.layer, strict=False):
            expected = layer(states)
            expected = expected[0] if isinstance(expected, tuple) else expected
            found = block(states.transpose(0, 1)).transpose(0, 1)
            torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    words = start.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert torch.equal(model.bridgetower.text_model.embeddings.word_embeddings.weight, words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128, "num_attention_heads": 2}, "hidden_size, .* differ"),
        ({"num_attention_heads": 2}, "one per 64 channels"),
        ({"intermediate_size": 300}, "intermediate_size differ"),
        ({"vocab_size": 60}, "vocab_size differ"),
    ],
)
def test_a_vilt_that_does_not_fit(changes, message):
    text = tiny.bridgetower_config().text_config.to_dict()
    text["hidden_size"] = changes.get("hidden_size", 64)
    vision = tiny.bridgetower_config().vision_config.to_dict() | {"hidden_size": 64}
    kind = "BridgeTowerForQuestionAnswering"
    model = tiny.model(
        kind, text_config=text, vision_config=vision, hidden_size=text["hidden_size"]
    )
    with pytest.raises(ValueError, match=message):
        init_bridgetower_from_vilt(model, vilt(**changes))
