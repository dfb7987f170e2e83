"""Evaluation: scores, samples, prediction files, broken pictures; the commands on top."""

import json

import pytest
import torch
from PIL import Image

import pumer
from pumer.cli import main
from pumer.data.images import BrokenImageError, Square
from pumer.data.scene_questions import ask
from pumer.data.scenes import draw
from pumer.data.text import TextTransform, train_tokenizer
from pumer.data.transforms import build_transform, load_transform, save_transform
from pumer.evaluate import evaluate, predict, write_samples
from pumer.hub import save
from pumer.tasks.base import Collator, Example
from pumer.tasks.scenes import Scenes, dense_labels
from tiny import model as tiny_model


@pytest.fixture(scope="module")
def task():
    return Scenes(questions=12, per_picture=2, image_size=96)


@pytest.fixture(scope="module")
def tokenizer(task):
    return train_tokenizer([example.text for example in task.examples("train")[:]], 300)


@pytest.fixture(scope="module")
def model(task):
    labels = dict(enumerate(task.labels))
    return tiny_model(num_labels=len(labels), id2label=labels, vocab_size=300, max_position_embeddings=24)


@pytest.fixture
def collator(task, tokenizer):
    return Collator(task, TextTransform(tokenizer, 24), Square(96))


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    save(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_transform(Square(96), tmp_path / "model")
    return tmp_path / "model"


def test_examples_are_the_same_one_at_a_time_and_together(task):
    examples = task.examples("test")
    together = examples[:]
    for number in (0, 3, 11):
        alone = examples[number]
        assert (alone.id, alone.text, alone.target) == (number, together[number].text, together[number].target)
        assert alone.images[0].tobytes() == together[number].images[0].tobytes()
    with pytest.raises(IndexError):
        examples[12]


def test_reduced_and_batched_predictions_score_alike(model, collator, task):
    examples = task.examples("test")
    with pumer.reduced(model, pumer.PuMer(layers=(0, 1))):
        one, many = (evaluate(model, examples, collator, batch_size=size) for size in (1, 5))
    assert one.predictions == many.predictions
    assert one.metric["accuracy_low"] <= one.metric["accuracy"] <= one.metric["accuracy_high"]
    right = [task.score(one.predictions[example.id], example) for example in examples[:]]
    assert one.metric["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=0.01)


def test_broken_pictures_are_reported_and_left_out(model, collator, task):
    examples = task.examples("test")[:4]
    broken = Example(99, "is there a red circle?", (b"no picture",), examples[0].target, 99, examples[0].meta)
    with pytest.raises(BrokenImageError, match="99"):
        predict(model, [*examples, broken], collator)
    result = predict(model, [*examples, broken], collator, skip_broken=True)
    assert list(result.broken) == [99]
    assert set(result.predictions) == {example.id for example in examples}


def test_samples_are_one_line_each(model, collator, task, tmp_path):
    examples = task.examples("test")
    result = evaluate(model, examples, collator)
    write_samples(tmp_path / "samples.jsonl", result, examples, collator)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(12))
    assert 100 * sum(row["score"] for row in rows) / 12 == pytest.approx(result.metric["accuracy"], abs=0.01)


def test_transforms_come_back_as_they_were(tmp_path):
    square = {"kind": "square", "size": 64}
    for settings in (square, {"kind": "keep_aspect", "shorter": 48, "longer": 192, "multiple": 8}):
        transform = build_transform(settings)
        save_transform(transform, tmp_path)
        assert load_transform(tmp_path) == transform
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 384}, "size_divisor": 32}')
    picture = Image.new("RGB", (640, 480))
    assert load_transform(tmp_path)(picture).shape == (3, 384, 512)
    with pytest.raises(ValueError, match="no setting colour"):
        build_transform({"kind": "square", "size": 64, "colour": 1})


def test_commands_evaluate_and_predict(folder, tmp_path, capsys):
    task = json.dumps({"name": "scenes", "questions": 8})
    samples = tmp_path / "samples.jsonl"
    command = ["eval", "--model", str(folder), "--task", task, "--reducer", "random", "--samples", str(samples)]
    assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out
    assert len(samples.read_text().splitlines()) == 8
    out = tmp_path / "predictions.json"
    assert main(["predict", "--model", str(folder), "--task", task, "--split", "test", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 8


def test_commands_explain_what_is_wrong(folder, capsys):
    assert main(["eval", "--model", "nowhere"]) == 2
    assert "no model folder" in capsys.readouterr().err
    assert main(["eval", "--model", str(folder), "--reducer", "best"]) == 2
    assert "no reducer is named 'best'" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0
    assert "pumer COMMAND --help" in capsys.readouterr().out


def test_command_list_names_everything(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in ("pumer", "tome", "vilt-vqav2", "ViltForQuestionAnswering", "vqav2", "nlvr"):
        assert word in shown


def test_predictions_are_of_the_eval_mode(model, collator, task):
    model.train()
    first = predict(model, task.examples("test"), collator).predictions
    assert not model.training
    assert first == predict(model, task.examples("test"), collator).predictions
    assert torch.is_grad_enabled()


def test_dense_labels_say_how_two_objects_lie():
    pictures = range(40)
    scenes = draw(1, pictures)
    questions = [q for q in ask(scenes, 1, pictures, per_picture=6) if q.kind in ("relation", "colour")]
    labels = dense_labels(scenes, questions, 8)
    seen = set()
    for question, rows in zip(questions, labels, strict=True):
        about, beside, above = rows[:, 2], rows[:, 5], rows[:, 6]
        if question.kind == "colour":
            assert set(about.tolist()) == {0, 1}
            assert not beside.any()
            continue
        one, other = question.referents
        place = [(scenes.x[question.picture, k].item(), scenes.y[question.picture, k].item()) for k in (one, other)]
        assert set(beside[beside > 0].tolist()) == {1 if place[1][0] < place[0][0] else 2}
        assert set(above[above > 0].tolist()) == {1 if place[1][1] < place[0][1] else 2}
        assert (about == 2).any()
        word = next(w for w in ("left", "right", "above", "below", "higher", "lower") if w in question.question)
        side, wanted = {"left": (beside, 2), "right": (beside, 1)}.get(
            word, (above, 2 if word in ("above", "higher") else 1)
        )
        assert (question.answer == "yes") == (side.max() == wanted)
        seen.add(word)
    assert len(seen) == 6
