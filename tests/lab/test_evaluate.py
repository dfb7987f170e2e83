"""Evaluation: scores, samples, prediction files, broken pictures; the commands on top."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import meter_config
from tiny import model as tiny_model

import pumer
from pumer.cli import main
from pumer.hub import save
from pumer.lab.data.images import BrokenImageError, KeepAspect, Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.data.transforms import build_transform, load_transform, save_transform
from pumer.lab.evaluate import constant_accuracy, evaluate, predict, take, write_samples
from pumer.lab.scenes.drawing import draw_scenes
from pumer.lab.scenes.other_tasks import ScenesNLVR2, ScenesRetrieval, ScenesVE
from pumer.lab.scenes.questions import ask
from pumer.lab.scenes.tasks import Scenes, dense_labels
from pumer.lab.tasks.base import Collator, Example


@pytest.fixture(scope="module")
def task():
    return Scenes(questions=12, per_picture=2, image_size=96)


@pytest.fixture(scope="module")
def tokenizer(task):
    return train_tokenizer([example.text for example in task.examples("train")[:]], 300)


@pytest.fixture(scope="module")
def model(task):
    labels = dict(enumerate(task.labels))
    return tiny_model(
        num_labels=len(labels), id2label=labels, vocab_size=300, max_position_embeddings=24
    )


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
        assert (alone.id, alone.text, alone.target) == (
            number,
            together[number].text,
            together[number].target,
        )
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
    broken = Example(
        99, "is there a red circle?", (b"no picture",), examples[0].target, 99, examples[0].meta
    )
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
    assert 100 * sum(row["score"] for row in rows) / 12 == pytest.approx(
        result.metric["accuracy"], abs=0.01
    )


def test_transforms_come_back_as_they_were(tmp_path):
    square = {"kind": "square", "size": 64}
    for settings in (square, {"kind": "keep_aspect", "shorter": 48, "longer": 192, "multiple": 8}):
        transform = build_transform(settings)
        save_transform(transform, tmp_path)
        assert load_transform(tmp_path) == transform
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 384}, '
        '"size_divisor": 32}'
    )
    picture = Image.new("RGB", (640, 480))
    assert load_transform(tmp_path)(picture).shape == (3, 384, 512)
    with pytest.raises(ValueError, match="no setting colour"):
        build_transform({"kind": "square", "size": 64, "colour": 1})


def test_commands_evaluate_and_predict(folder, tmp_path, capsys):
    task = json.dumps({"name": "scenes", "questions": 8})
    samples = tmp_path / "samples.jsonl"
    command = [
        "eval",
        "--model",
        str(folder),
        "--task",
        task,
        "--reducer",
        "random",
        "--samples",
        str(samples),
    ]
    assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out
    assert len(samples.read_text().splitlines()) == 8
    out = tmp_path / "predictions.json"
    assert (
        main(
            [
                "predict",
                "--model",
                str(folder),
                "--task",
                task,
                "--split",
                "test",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert len(json.loads(out.read_text())) == 8


DEEP = '{"reducer": "tome", "depth": 12}'


def test_commands_explain_what_is_wrong(folder, capsys):
    assert main(["eval", "--model", "nowhere"]) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert main(["eval", "--model", str(folder), "--reducer", "best"]) == 2
    assert "no reducer is named 'best'" in capsys.readouterr().err
    for words, message in (
        (
            ["eval", "--model", str(folder), "--task", "vqav2"],
            'needs root: give it as {"name": "vqav2", "root"',
        ),
        (
            ["eval", "--model", str(folder), "--reducer", DEEP],
            "the model has layers 0 to 3: give depth=4, or leave it",
        ),
        (
            ["viz", "--model", "scenes-vilt", "--out", "a.png"],
            "nothing reduces scenes-vilt: give --reducer",
        ),
        (
            ["train", "--config", "scenes-pumper", "--output", "a"],
            "no file, nor a recipe that `pumer list` names",
        ),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0
    assert "pumer COMMAND --help" in capsys.readouterr().out


def test_command_list_names_everything(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "pumer",
        "tome",
        "vilt-vqav2",
        "ViltForQuestionAnswering",
        "vqav2",
        "nlvr",
        "scenes-pumer",
    ):
        assert word in shown


@pytest.mark.parametrize("kind", [Scenes, ScenesNLVR2])
def test_what_a_blind_model_is_not_shown_says_nothing(kind, tokenizer):
    task = kind(questions=6)
    examples = task.examples("test")[:]
    seen, unseen = examples[0], replace(examples[5], text=examples[0].text)
    wide = tuple(Image.new("RGB", (200, 90), (255, 0, 0)) for _ in unseen.images)
    sighted = Collator(task, TextTransform(tokenizer, 24), KeepAspect(64, multiple=16))
    text_alone, image_alone = (replace(sighted, blind=blind) for blind in ("text", "image"))
    one, other = (text_alone([example]) for example in (seen, replace(unseen, images=wide)))
    assert all(torch.equal(one[name], other[name]) for name in one if name != "labels")
    assert one["pixel_values"].abs().max() < 0.01
    assert torch.equal(one["input_ids"], sighted([seen])["input_ids"])
    two = image_alone([seen, examples[5]])
    assert torch.equal(*two["input_ids"])
    assert two["attention_mask"].all()
    assert torch.equal(two["pixel_values"], sighted([seen, examples[5]])["pixel_values"])


def test_of_equal_texts_there_is_none_to_rank(tokenizer):
    with pytest.raises(ValueError, match="blind text"):
        Collator(ScenesRetrieval(), TextTransform(tokenizer), Square(32), "image")


def test_the_best_constant_answer_is_found(task):
    for some in (Scenes(questions=30), ScenesVE(questions=9)):
        examples = some.examples("test")[:]
        best = max(
            some.metric({e.id: label for e in examples}, examples)["accuracy"]
            for label in some.labels
        )
        assert constant_accuracy(some, examples) == best
    ranking = ScenesRetrieval(questions=3, negatives=4)
    assert constant_accuracy(ranking, ranking.examples("test")[:]) == 20


def test_texts_are_ranked_as_alone(tokenizer, monkeypatch):
    task = ScenesRetrieval(questions=5, negatives=2, image_size=32)
    words = {"vocab_size": 300, "max_position_embeddings": 24}
    changes = {
        "Vilt": words,
        "Meter": {"text_config": meter_config().text_config.to_dict() | words},
    }
    for family in changes:
        model = tiny_model(f"{family}ForImageAndTextRetrieval", **changes[family])
        collator = Collator(task, TextTransform(tokenizer, 20), Square(96))
        assert (
            evaluate(model, task.examples("test"), collator, batch_size=2).metric["constant"]
            == 33.33
        )
        with monkeypatch.context() as patch:  # all scores instead of the best one's number
            patch.setattr(ScenesRetrieval, "decode", lambda self, logits: logits)
            found = predict(model, task.examples("test"), collator, batch_size=2).predictions
        for example in task.examples("test")[:]:
            scores = []
            for text in (example.text, *example.negatives):
                pair = collator([replace(example, text=text, negatives=())])
                with torch.no_grad():
                    logits = model(**{name: pair[name] for name in pair if name != "labels"}).logits
                scores.append(logits.flatten())
            torch.testing.assert_close(found[example.id], torch.cat(scores), atol=1e-5, rtol=1e-4)
        alone = torch.stack(list(found.values()))
        assert (alone[0] - alone[1]).abs().min() > 1e-4


def test_the_command_hides_and_says_so(folder, tmp_path, capsys):
    record = tmp_path / "record.csv"
    task = json.dumps({"name": "scenes", "questions": 8})
    for blind in ("text", "image"):
        more = ["--blind", blind, "--record", str(record)]
        assert main(["eval", "--model", str(folder), "--task", task, *more]) == 0
        shown = capsys.readouterr().out
        assert f"{blind} alone" in " ".join(shown.split())
        assert "constant" in shown
    with record.open(newline="") as file:
        details = [json.loads(row["details"]) for row in csv.DictReader(file)]
    assert [row["blind"] for row in details] == ["text", "image"]
    scenes = Scenes(questions=8)
    assert details[0]["constant"] == constant_accuracy(scenes, scenes.examples("test")[:])


def test_examples_are_taken_from_sequences_that_cannot_be_sliced():
    assert take(("a", "b", "c"), range(3)[:2]) == ["a", "b"]
    examples = Scenes(questions=4, image_size=32).examples("test")
    assert [example.id for example in take(examples, range(4)[1:])] == [1, 2, 3]


def test_predictions_are_of_the_eval_mode(model, collator, task):
    model.train()
    first = predict(model, task.examples("test"), collator).predictions
    assert not model.training
    assert first == predict(model, task.examples("test"), collator).predictions
    assert torch.is_grad_enabled()


def test_dense_labels_say_how_two_objects_lie():
    pictures = range(40)
    scenes = draw_scenes(1, pictures)
    questions = [
        q for q in ask(scenes, 1, pictures, per_picture=6) if q.kind in ("relation", "colour")
    ]
    labels = dense_labels(scenes, questions, 8)
    seen = set()
    for question, rows in zip(questions, labels, strict=True):
        about, beside, above = rows[:, 2], rows[:, 5], rows[:, 6]
        if question.kind == "colour":
            assert set(about.tolist()) == {0, 1}
            assert not beside.any()
            continue
        one, other = question.referents
        place = [
            (scenes.x[question.image_index, k].item(), scenes.y[question.image_index, k].item())
            for k in (one, other)
        ]
        assert set(beside[beside > 0].tolist()) == {1 if place[1][0] < place[0][0] else 2}
        assert set(above[above > 0].tolist()) == {1 if place[1][1] < place[0][1] else 2}
        assert (about == 2).any()
        word = next(
            w
            for w in ("left", "right", "above", "below", "higher", "lower")
            if w in question.question
        )
        side, wanted = {"left": (beside, 2), "right": (beside, 1)}.get(
            word, (above, 2 if word in ("above", "higher") else 1)
        )
        assert (question.answer == "yes") == (side.max() == wanted)
        seen.add(word)
    assert len(seen) == 6
