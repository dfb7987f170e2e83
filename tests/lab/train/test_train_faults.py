"""Trainings that go wrong say so, and lose nothing: other answers, teachers, NaN, resuming,
half-written folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import model as tiny_model

import pumer
from pumer._shipped import SHIPPED
from pumer.cli import main
from pumer.hub import load
from pumer.lab.data.images import Square
from pumer.lab.data.text import load_tokenizer, train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.evaluate import constant_accuracy
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks import VQAv2
from pumer.lab.tasks.prompts import collator_for
from pumer.lab.tasks.vqav2 import with_new_answers
from pumer.lab.train import run as runs
from pumer.lab.train.run import train
from pumer.lab.train.settings import (
    DistillSettings,
    EarlyStoppingSettings,
    ModelSettings,
    TrainSettings,
)
from pumer.lab.train.teacher import TeachingCollator, teachers_collator
from pumer.lab.train.watch import log_line

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "vqav2"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
TASK = {"name": "scenes", "questions": 12, "image_size": 32}
STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}
SIZES = {"vocab_size": 150, "max_position_embeddings": 24, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [e.text for e in Scenes(questions=300, image_size=32).examples("train")[:]], 150
    )


def write_model(folder, tokenizer, image=32, **changes):
    labels = dict(enumerate(Scenes().labels))
    pumer.save(
        tiny_model(**SIZES | {"num_labels": len(labels), "id2label": labels} | changes), folder
    )
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    save_transform(Square(image), folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("start") / "model", tokenizer)


def go(out, model, **more):
    settings = {"eval_split": None, "trainer": STEPS} | more
    return train(
        TrainSettings(
            str(out),
            settings.pop("task", TASK),
            ModelSettings(path=model, max_length=24),
            **settings,
        )
    )


# --- data with answers of their own ---


@pytest.fixture
def scans(tmp_path):
    """The fixture, whose every answer is "Aorta" but for the last question's."""
    root = shutil.copytree(FIXTURE, tmp_path / "scans")
    content = json.loads((root / ANNOTATIONS).read_text())
    for row in content["annotations"]:
        word = "Aorta" if row is not content["annotations"][-1] else "left lung"
        row["multiple_choice_answer"] = word
        for answer in row["answers"]:
            answer["answer"] = word
    (root / ANNOTATIONS).write_text(json.dumps(content))
    return {"name": "vqav2", "root": str(root)}


def test_data_without_any_answer_of_the_model_is_refused(scans, tmp_path, capsys):
    options = [
        "--model.path",
        "scenes-vilt",
        "--model.kind",
        "ViltForQuestionAnswering",
        "--train_split",
        "val2014",
    ]
    command = ["train", *options, "--task", json.dumps(scans), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "none of the 8 examples of vqav2 val2014 has an answer among the model's 28" in error
    assert "--task.answers data" in error
    assert not (tmp_path / "out").exists()


def test_new_answers_are_counted_in_the_data(scans, model, tmp_path, capsys, caplog):
    options = ["--model.path", model, "--train_split", "val2014", "--eval_split", "val2014"]
    options += ["--task", json.dumps(scans), "--task.answers", "data", "--task.min_count", "2"]
    steps = {**STEPS, "max_steps": 40, "learning_rate": 1e-2, "logging_steps": 20}
    command = ["train", *options, "--trainer", json.dumps(steps), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "training on vqav2 val2014: 8 examples, 1 answers, 1 examples without a target; 40 steps; "
        f"the model will be in {tmp_path / 'out/model'}"
    )
    assert (
        "1 of 2 answers have fewer than 2 questions and are left out, with 1 of 8 questions"
        in caplog.text
    )
    assert lines[-1] == f"the model is in {tmp_path / 'out/model'}, accuracy 87.50 % on val2014"
    assert any(line.startswith("step 20/40: loss ") and "accuracy" in line for line in lines)
    assert not any("{" in line for line in lines)
    assert load(tmp_path / "out/model").config.id2label == {0: "aorta"}
    recipe = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert recipe["task"]["min_count"] in (2, "2")


def test_answers_are_counted_in_the_split_or_where_the_settings_say(scans, tmp_path):
    root = Path(scans["root"])
    task = VQAv2(root, answers="data", min_count=1)
    assert with_new_answers(task, "val2014").labels == ("aorta", "left lung")
    shutil.copy(FIXTURE / ANNOTATIONS, root / "v2_mscoco_mine_annotations.json")
    assert "tree" in with_new_answers(replace(task, answer_splits=("mine",)), "val2014").labels
    with pytest.raises(ValueError, match="min_count is 0; give at least 1"):
        VQAv2(root, min_count=0)


def test_the_constant_answer_is_one_of_the_data(scans):
    task = VQAv2(scans["root"], labels=("yes", "no"))
    examples = list(task.examples("val2014"))
    assert all(example.target == {} for example in examples)
    # The official evaluator compares raw where all agree, and "Aorta" is then not "aorta".
    assert constant_accuracy(task, examples) == 12.5


def test_labels_that_are_no_words_are_refused_before_anything_is_read(model, tmp_path):
    task = yaml.safe_load("{name: vqav2, root: nowhere, labels: [yes, no, rectangle]}")
    with pytest.raises(ValueError, match=r"labels is \[True, False, 'rectangle'\].*in quotes"):
        go(tmp_path / "out", model, task=task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1.5}, r"train: seed is 1\.5; expected int"),
        (
            {"distill": DistillSettings(weight="much")},
            r"train: distill\.weight is 'much'; expected float",
        ),
        ({"trainer": STEPS | {"max_steps": True}}, "trainer: max_steps is True; expected int"),
        (
            {"distill": DistillSettings(temperature=0.0)},
            r"distill\.temperature: give a number above 0",
        ),
        (
            {"trainer": STEPS | {"metric_for_best_model": "acuracy"}},
            "'acuracy': give accuracy or loss",
        ),
        (
            {"trainer": STEPS | {"load_best_model_at_end": True}},
            "needs evaluations, which eval_split null leaves out",
        ),
        (
            {"early_stopping": EarlyStoppingSettings()},
            "early_stopping needs|load_best_model_at_end needs",
        ),
    ],
)
def test_settings_are_checked_before_the_model_is_read(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "out", "nowhere", **settings)
    assert not (tmp_path / "out").exists()


# --- teachers ---


def test_a_teacher_is_fed_by_its_own_tokenizer_and_images(model, tokenizer, tmp_path):
    task = Scenes(questions=4, image_size=32)
    student = collator_for(load(model), task, tokenizer, Square(32), 24)
    assert teachers_collator(load(model), model, student).text is student.text
    words = train_tokenizer(
        ["which shape is blue", *(e.text for e in task.examples("train")[:])], 90
    )
    names = list(reversed(Scenes().labels))
    other = write_model(tmp_path / "teacher", words, 24, id2label=dict(enumerate(names)))
    teacher = teachers_collator(load(other), other, student)
    batch = TeachingCollator(student, teacher)(task.examples("train")[:])
    own = teacher(task.examples("train")[:])
    assert batch["pixel_values"].shape[-1] == 32
    for name in ("input_ids", "pixel_values", "pixel_mask"):
        assert torch.equal(batch["teacher_inputs"][name], own[name])
    assert not torch.equal(batch["input_ids"], batch["teacher_inputs"]["input_ids"])
    assert teacher.order == tuple(reversed(range(len(names))))
    log = go(tmp_path / "out", model, distill=DistillSettings(other))
    assert log == {}
    assert json.loads((tmp_path / "out/log.json").read_text())[0]["distill_loss"] > 0


# --- what is not finite ---


@pytest.mark.parametrize("rate", [1e20, 1e38])
def test_a_rate_that_breaks_the_model_stops_the_training(model, tmp_path, capsys, rate):
    with pytest.raises(
        ValueError, match=r"not finite at step [123], and nothing.*lower trainer\.learning_rate"
    ):
        go(
            tmp_path / "out",
            model,
            trainer=STEPS | {"learning_rate": rate, "save_steps": 1, "max_grad_norm": 0.0},
        )
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/log.json").exists()
    assert "nan" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(model, tmp_path, monkeypatch):
    def spoil(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        self.model.classifier[3].bias.data[0] = float("nan")
        return loss

    step = runs.TaskTrainer.training_step
    monkeypatch.setattr(runs.TaskTrainer, "training_step", spoil)
    with pytest.raises(
        ValueError, match=r"1 weights, classifier\.3\.bias the first, are not finite at step 1"
    ):
        go(tmp_path / "out", model, trainer=STEPS | {"max_steps": 1})
    assert not (tmp_path / "out/model").exists()


# --- going on ---


@pytest.fixture
def stopped(model, tmp_path):
    """A training of three steps with a checkpoint at each."""
    go(tmp_path / "out", model, trainer=STEPS | {"save_steps": 1})
    return tmp_path / "out"


def resume(out, model, **more):
    trainer = STEPS | {"save_steps": 1, "max_steps": 4} | more.pop("trainer", {})
    return go(out, model, resume=True, trainer=trainer, **more)


def test_resuming_leaves_what_is_not_its_own(stopped, model):
    (stopped / "checkpoint-best").mkdir()
    (stopped / "checkpoint-best/precious").write_text("mine")
    (stopped / "checkpoint-9").mkdir()  # what a kill leaves
    resume(stopped, model)
    assert (stopped / "checkpoint-best/precious").read_text() == "mine"
    assert not (stopped / "checkpoint-9").exists()
    assert (stopped / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"trainer": {"learning_rate": 1e-2}}, r"trainer\.learning_rate was 0\.001, is 0\.01"),
        (
            {"reducer": {"reducer": "random", "layers": [1]}},
            r"reducer\.reducer was None, is 'random'",
        ),
        ({"task": TASK | {"questions": 13}}, r"task\.questions was 12, is 13"),
    ],
)
def test_other_settings_do_not_go_on(stopped, model, changes, message):
    with pytest.raises(ValueError, match=rf"began with other settings \({message}"):
        resume(stopped, model, **changes)
    assert (stopped / "model/config.json").is_file()
    assert not (stopped / "checkpoint-4").exists()


def test_settings_that_change_no_step_may_be_others(stopped, model):
    resume(stopped, model, trainer={"logging_steps": 2, "save_total_limit": 1})
    assert yaml.safe_load((stopped / "recipe.yaml").read_text())["trainer"]["max_steps"] == 4


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_states_is_refused(stopped, model, file):
    (stopped / "checkpoint-3" / file).unlink()
    with pytest.raises(
        ValueError, match=rf"checkpoint-3 lacks the state of its {file.partition('.')[0]}"
    ):
        resume(stopped, model)
    shutil.rmtree(stopped / "checkpoint-3")
    resume(stopped, model)


def test_the_model_folder_appears_whole(model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(runs, "save_transform", fail)
    with pytest.raises(OSError, match="disk full"):
        go(tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-3",
        "recipe.yaml",
    ]


def test_a_folder_without_tokenizer_is_refused(tokenizer, tmp_path, capsys):
    folder = Path(write_model(tmp_path / "model", tokenizer))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="none of the files of a tokenizer"):
        load_tokenizer(folder)
    for command in (
        ["eval", "--model", str(folder)],
        ["train", "--model.path", str(folder), "--output", "x"],
    ):
        assert main([*command, "--task", json.dumps(TASK)]) == 2
        assert "none of the files of a tokenizer" in capsys.readouterr().err
    assert load_tokenizer(SHIPPED / "scenes-vilt").pad_token_id == 0


def test_a_stock_folder_is_told_how_to_convert(model, tmp_path, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "stock"))
    (folder / "pumer.json").unlink()
    assert main(["eval", "--model", str(folder)]) == 2
    assert f"`pumer convert {folder} FOLDER`" in capsys.readouterr().err


# --- stopping early ---


def test_a_training_stops_early_and_keeps_the_best(model, tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 20.0, 25.0, 99.0, 99.0])
    monkeypatch.setattr(
        runs.TaskTrainer, "metrics", staticmethod(lambda _: {"accuracy": next(accuracies)})
    )
    go(
        tmp_path / "out",
        model,
        eval_split="val",
        early_stopping=EarlyStoppingSettings(patience=2),
        trainer=STEPS | {"max_steps": -1, "num_train_epochs": 20},
    )
    log = json.loads((tmp_path / "out/log.json").read_text())
    assert [row["eval_accuracy"] for row in log if "eval_accuracy" in row] == [
        10.0,
        30.0,
        20.0,
        25.0,
        99.0,
    ]
    best = load_file(tmp_path / "out/checkpoint-6/model.safetensors")
    for name, value in load(tmp_path / "out/model").state_dict().items():
        assert torch.equal(value, best[name]), name


def test_lines_of_a_log_can_be_read():
    logs = {
        "loss": 2.34567,
        "learning_rate": 0.0003,
        "task_loss": 2.0,
        "accuracy": 45.678,
        "epoch": 1.0,
    }
    line = "step 20/100: loss 2.346, learning rate 3.00e-04, task loss 2, accuracy 45.68 %"
    assert log_line(logs, 20, 100) == line
    logs = {
        "eval_loss": 1.5,
        "eval_accuracy": 50.0,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 9.0,
    }
    assert log_line(logs, 20, 100) == "step 20/100 evaluated: loss 1.5, accuracy 50.00 %"
    assert (
        log_line({"train_runtime": 90.0, "train_loss": 1.0}, 100, 100)
        == "step 100/100: trained in 1.5 min"
    )


# --- masks ---


@pytest.mark.parametrize("kind", ["ViltForQuestionAnswering", "MeterForQuestionAnswering"])
def test_a_mask_shorter_than_its_text_is_refused(kind):
    net = pumer.apply(tiny_model(kind), pumer.PuMer(layers=(0,)))
    inputs = {"input_ids": torch.randint(3, 50, (2, 8)), "pixel_values": torch.randn(2, 3, 96, 96)}
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 6\] for texts of \[2, 8\]"):
        net(**inputs, attention_mask=torch.ones(2, 6, dtype=torch.int64))


def test_weights_of_more_layers_than_the_settings_are_refused(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"classifier.9.bias": torch.zeros(1)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"have classifier\.9\.bias"):
        load(folder)
