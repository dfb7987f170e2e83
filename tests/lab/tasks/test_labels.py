"""A model's outputs and a task's labels: matched by name, refused where they do not fit."""

import json

import pytest
import tiny
import torch
from transformers import TrainingArguments, ViltConfig

from pumer.cli import main
from pumer.hub import save
from pumer.lab import tasks
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.evaluate import evaluate, predict
from pumer.lab.scenes.other_tasks import ScenesNLVR2, ScenesRetrieval, ScenesVE
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.score import score_pairs
from pumer.lab.tasks.base import Example
from pumer.lab.tasks.labels import check_fit, label_names, label_order
from pumer.lab.tasks.prompts import collator_for
from pumer.lab.train.trainer import TaskTrainer

VE = ("contradiction", "neutral", "entailment")
SHUFFLED = ("entailment", "contradiction", "neutral")


def config(names, **more):
    return ViltConfig(id2label=dict(enumerate(names)), **more)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [example.text for example in ScenesVE(questions=60).examples("train")[:]], 300
    )


def entailment(names):
    """A tiny model whose outputs stand for these names; the same weights for the same name."""
    words = {"vocab_size": 300, "max_position_embeddings": 40}
    model = tiny.model(
        "ViltForVisualEntailment", num_labels=3, id2label=dict(enumerate(names)), **words
    )
    rows = torch.tensor([VE.index(name) for name in names])
    last = model.classifier[3]
    with torch.no_grad():
        torch.manual_seed(3)
        last.weight.copy_(torch.randn(last.weight.shape)[rows])
        last.bias.copy_(torch.tensor([0.0, 0.1, 0.2])[rows])
    return model


# --- names ---


def test_labels_are_matched_by_name():
    task = ScenesVE()
    assert label_order(config(VE), task) is None
    assert label_order(config(SHUFFLED), task) == (1, 2, 0)
    assert label_order(config(["ENTAILMENT", "Neutral", "Contradiction"]), task) == (2, 1, 0)
    assert label_order(config(["True", "False"]), tasks.NLVR("")) == (1, 0)


def test_names_may_stand_in_label2id_alone():
    unnamed = ViltConfig(num_labels=3)
    unnamed.label2id = {"entailment": 0, "contradiction": 1, "neutral": 2}
    assert label_names(unnamed) == list(SHUFFLED)
    assert label_order(unnamed, ScenesVE()) == (1, 2, 0)


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"], [0, 1, 2]])
def test_numbers_are_taken_as_they_are_and_said(names, caplog):
    assert label_order(config(names), ScenesVE()) is None
    assert "taken for contradiction, neutral, entailment, in this order" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ["yes", "perhaps", "no"],
        ["contradiction", "entailment"],
        ["LABEL_0", "LABEL_1"],
        ["0", "2", "1"],
    ],
)
def test_other_names_are_refused(names):
    with pytest.raises(
        ValueError, match=r"are not those of the task scenes-ve \(contradiction, neutral, entail"
    ):
        label_order(config(names), ScenesVE())


def test_names_of_an_entailment_model_stay():
    assert list(entailment(SHUFFLED).config.id2label.values()) == list(SHUFFLED)
    named = tiny.config(id2label={0: "yes", 1: "perhaps", 2: "no"})
    assert list(tiny.ViltForVisualEntailment(named).config.id2label.values()) == [
        "yes",
        "perhaps",
        "no",
    ]


# --- use ---


def test_evaluation_maps_outputs_by_name(tokenizer):
    task = ScenesVE(questions=18)
    first, second = (entailment(names) for names in (VE, SHUFFLED))
    results = [
        evaluate(model, task.examples("test"), collator_for(model, task, tokenizer, Square(96)))
        for model in (first, second)
    ]
    assert results[0].predictions == results[1].predictions
    assert results[0].metric == results[1].metric


def test_training_maps_outputs_by_name(tokenizer, tmp_path):
    task = ScenesVE(questions=8)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    losses = []
    for names in (VE, SHUFFLED):
        model = entailment(names)
        collator = collator_for(model, task, tokenizer, Square(96))
        trainer = TaskTrainer(model.eval(), arguments, task=task, data_collator=collator)
        losses.append(trainer.compute_loss(model, collator(task.examples("train")[:])))
    torch.testing.assert_close(losses[0], losses[1])


def test_outputs_that_are_not_numbers_are_not_scored(tokenizer):
    task, model = ScenesVE(questions=4), entailment(VE)
    model.classifier[3].bias.data[1] = float("nan")
    with pytest.raises(
        ValueError, match=r"the outputs for 4 of 4 inputs are NaN.*get the model again"
    ):
        predict(model, task.examples("test"), collator_for(model, task, tokenizer, Square(96)))


def test_scores_of_pairs_that_are_not_numbers_are_refused(tokenizer):
    words = {"vocab_size": 300, "max_position_embeddings": 40}
    model = tiny.model("ViltForImageAndTextRetrieval", **words)
    model.rank_output.bias.data[0] = float("nan")
    pool = ScenesRetrieval(pictures=2, image_size=32).pool("test")
    with pytest.raises(ValueError, match="20 of 20 scores of a chunk are NaN"):
        score_pairs(model, pool.images, pool.captions, TextTransform(tokenizer, 24), Square(96))


# --- fit ---

HEADS = {
    "ViltForQuestionAnswering": Scenes(),
    "ViltForImagesAndTextClassification": ScenesNLVR2(),
    "ViltForVisualEntailment": ScenesVE(),
    "ViltForImageAndTextRetrieval": ScenesRetrieval(),
}


@pytest.mark.parametrize("family", ["Vilt", "Meter"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_does_its_task(family, head):
    pair = {"num_images": 2, "modality_type_vocab_size": 3} if "Images" in head else {}
    model = tiny.model(head.replace("Vilt", family), **pair)
    for other, task in HEADS.items():
        # A classifier of one image does any task of one image that has its labels.
        if other == head or (
            head == "ViltForQuestionAnswering" and other == "ViltForVisualEntailment"
        ):
            check_fit(model, task)
        else:
            with pytest.raises(
                ValueError, match=f"{type(model).__name__} does not fit the task {task.name}, which"
            ):
                check_fit(model, task)


@pytest.mark.parametrize("kind", ["ViltForMaskedLM", "ViltForTokenClassification", "ViltModel"])
def test_other_models_do_no_task(kind):
    with pytest.raises(ValueError, match="does not fit the task scenes"):
        check_fit(tiny.model(kind), Scenes())


def test_a_model_without_names_answers_no_questions(tokenizer):
    model = tiny.model(num_labels=4)
    task = tasks.build({"name": "vqav2", "root": "x"}, label_names(model.config))
    with pytest.raises(ValueError, match=r"names no answers \(LABEL_0.*set its id2label"):
        collator_for(model, task, tokenizer, Square(96))


@pytest.mark.parametrize("name", ["scenes-retrieval", "scenes-nlvr2", "scenes-ve"])
@pytest.mark.parametrize("command", ["eval", "predict", "score", "train"])
def test_every_command_refuses_a_model_that_does_not_fit(
    command, name, tokenizer, tmp_path, capsys
):
    if (command, name) == ("train", "scenes-ve"):
        pytest.skip("a training gives the model a new head for other labels")
    folder = tmp_path / "model"
    labels = dict(enumerate(("circle", "square")))
    save(
        tiny.model(num_labels=2, id2label=labels, vocab_size=300, max_position_embeddings=40),
        folder,
    )
    tokenizer.save_pretrained(folder)
    save_transform(Square(96), folder)
    options = {
        "eval": ["--model", str(folder)],
        "predict": ["--model", str(folder), "--split", "test", "--out", str(tmp_path / "out")],
        "score": ["--model", str(folder), "--out", str(tmp_path / "out")],
        "train": ["--model.path", str(folder), "--output", str(tmp_path / "out")],
    }[command]
    task = ["--task", json.dumps({"name": name, "questions": 4})]
    assert main([command, *options, *task]) == 2
    error = capsys.readouterr().err
    if command == "score" and name != "scenes-retrieval":
        assert f"the task {name} is not one of retrieval" in error
    else:
        assert "does not fit the task" in error or "are not those of the task scenes-ve" in error
    assert not (tmp_path / "out").exists()


def test_examples_of_a_model_with_numbers_for_names_are_scored(tokenizer, caplog):
    model = entailment(VE)
    model.config.id2label = {0: 0, 1: 1, 2: 2}
    task = ScenesVE(questions=4)
    result = evaluate(
        model, task.examples("test"), collator_for(model, task, tokenizer, Square(96))
    )
    assert set(result.predictions.values()) <= set(VE)
    assert isinstance(task.examples("test")[0], Example)
