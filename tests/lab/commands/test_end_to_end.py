"""Every task in its official files through the real commands: train, load, evaluate, predict,
score; two processes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pumer
from pumer.cli import main
from pumer.lab.commands.common import open_task
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import CLIP_MEAN, CLIP_STD
from pumer.lab.evaluate import model_inputs, paired
from pumer.lab.tasks import build
from pumer.lab.tasks.retrieval import recalls
from pumer.lab.train.losses import matching_loss, task_loss

DATA = Path(__file__).parents[2] / "data" / "fixtures"
LABELS = ["2", "red", "no", "tree", "brown", "4", "windows", "yes"]
TASKS = {
    "vqav2": {"name": "vqav2", "root": str(DATA / "vqav2"), "labels": LABELS},
    "nlvr2": {"name": "nlvr2", "root": str(DATA / "nlvr2")},
    "snli-ve": {"name": "snli-ve", "root": str(DATA / "snli-ve")},
    "retrieval": {"name": "retrieval", "root": str(DATA / "flickr30k"), "negatives": 3},
}
SPLITS = {
    "vqav2": ("val2014", "val2014"),
    "nlvr2": ("train", "dev"),
    "snli-ve": ("train", "dev"),
    "retrieval": ("train", "test"),
}
HEADS = {
    "vqav2": "ForQuestionAnswering",
    "nlvr2": "ForImagesAndTextClassification",
    "snli-ve": "ForVisualEntailment",
    "retrieval": "ForImageAndTextRetrieval",
}
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SIZE |= {"initializer_range": 0.2}  # large enough for answers to depend on what is seen
TEXT = {"vocab_size": 200, "max_position_embeddings": 25, "pad_token_id": 0, "type_vocab_size": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PICTURE = {"image_size": 32, "patch_size": 8}
CONFIGS = {
    "Vilt": SIZE | PICTURE | {"vocab_size": 200, "max_position_embeddings": 24},
    "Meter": SIZE
    | {"text_config": SIZE | TEXT | NO_DROPOUT, "vision_config": SIZE | PICTURE}
    | NO_DROPOUT,
}
IMAGES = {
    "Vilt": {"kind": "keep_aspect", "shorter": 32, "multiple": 8},
    "Meter": {
        "kind": "square",
        "size": 32,
        "resample": 3,
        "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD),
    },
}
REDUCER = {"reducer": "pumer", "prune": 0.2, "merge": 0.3, "merge_text": 0.2, "layers": [0, 1]}
STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = [
        text
        for task, (train_split, eval_split) in SPLITS.items()
        for split in (train_split, eval_split)
        for example in build(TASKS[task]).examples(split)
        for text in (example.text, *example.negatives)
    ]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 200).save_pretrained(folder)
    return str(folder)


def write_recipe(path, family, task, tokenizer, trainer=None, changes=None):
    """A YAML file that trains a new tiny model with its reducer on."""
    pair = {"num_images": 2, "modality_type_vocab_size": 3} if task == "nlvr2" else {}
    recipe = {
        "model": {
            "kind": family + HEADS[task],
            "config": CONFIGS[family] | pair,
            "tokenizer": tokenizer,
            "max_length": 8,  # cuts some: commands have to as well
        },
        "task": TASKS[task],
        "reducer": REDUCER,
        "image": IMAGES[family],
        "train_split": SPLITS[task][0],
        "eval_split": SPLITS[task][1],
        "trainer": STEPS | (trainer or {}),
    }
    path.write_text(yaml.safe_dump(recipe | (changes or {})))
    return str(path)


def evaluation(folder):
    """What the training that wrote a folder found on its split for that."""
    (found,) = [
        row for row in json.loads((folder / "log.json").read_text()) if "eval_accuracy" in row
    ]
    return found


def loss_of(model, collator, examples):
    """The loss that training has on these examples in one batch."""
    batch = collator(examples)
    with torch.no_grad():
        output = model(**paired(model, model_inputs(batch), batch.get("texts_per_image", 1)))
    loss = task_loss(
        output.logits.reshape(len(examples), -1), batch["labels"], collator.task.loss_kind
    )
    if "itm_logits" in output:
        loss += 0.5 * matching_loss(output["itm_logits"], batch["labels"])
    return loss.item()


@pytest.mark.parametrize("family", ["Vilt", "Meter"])
@pytest.mark.parametrize("task", TASKS)
def test_trained_loaded_evaluated_and_predicted(family, task, tokenizer, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", family, task, tokenizer)
    assert main(["train", "--config", recipe, "--output", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run/model"
    model = pumer.load(folder)
    assert type(model).__name__ == family + HEADS[task]
    assert pumer.active(model).reducer == pumer.PuMer(0.2, 0.3, 0.2, (0, 1))

    # From the folder alone comes what the training saw: words, pixels, labels.
    trained = evaluation(tmp_path / "run")
    collator = open_task(str(folder), model, TASKS[task])
    examples = collator.task.examples(SPLITS[task][1])
    assert loss_of(model, collator, list(examples)) == pytest.approx(trained["eval_loss"], rel=1e-4)

    # So the commands find what the training found.
    asked = ["--model", str(folder), "--task", json.dumps(TASKS[task]), "--split", SPLITS[task][1]]
    samples, record = tmp_path / "samples.jsonl", tmp_path / "record.csv"
    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                *asked,
                "--samples",
                str(samples),
                "--record",
                str(record),
                "--batch_size",
                "3",
            ]
        )
        == 0
    )
    assert "constant" in capsys.readouterr().out
    with record.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["accuracy"]) == pytest.approx(trained["eval_accuracy"], abs=0.01)
    scored = [json.loads(line) for line in samples.read_text().splitlines()]
    assert 100 * np.mean([sample["score"] for sample in scored]) == pytest.approx(
        trained["eval_accuracy"], abs=0.01
    )

    # What it predicts is in the file that the official evaluator takes.
    out = tmp_path / "predictions"
    assert main(["predict", *asked, "--out", str(out)]) == 0
    assert read_predictions(task, out, examples) == {
        sample["id"]: sample["prediction"] for sample in scored
    }

    if task == "retrieval":
        check_pool(asked, examples, scored, tmp_path / "pool", capsys)


def read_predictions(task, path, examples):
    """A prediction file, by the evaluators' own reading of it."""
    text = path.read_text()
    if task == "vqav2":
        return {row["question_id"]: row["answer"] for row in json.loads(text)}
    if task == "nlvr2":
        return dict(line.split(",") for line in text.splitlines())
    rows = [json.loads(line) for line in text.splitlines()]
    if task == "snli-ve":
        return {row["pairID"]: row["prediction"] for row in rows}
    texts = {example.id: (example.text, *example.negatives) for example in examples}
    return {row["imgid"]: texts[row["imgid"]].index(row["caption"]) for row in rows}


def check_pool(asked, examples, scored, out, capsys):
    """`pumer score` prefers the captions that `pumer eval` did, and prints the recalls of its
    scores."""
    capsys.readouterr()
    assert main(["score", *asked, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    pool = build(TASKS["retrieval"]).pool("test")
    scores = np.load(out / "scores.npy")
    for name, value in recalls(scores, pool.image_of).items():
        assert f"{name} " in shown
        assert f"{value:.2f}" in shown
    chosen = {sample["id"]: sample["prediction"] for sample in scored}
    for example in examples:
        row = scores[pool.image_ids.index(example.id)]
        texts = (example.text, *example.negatives)
        of_each = [row[pool.captions.index(text)] for text in texts]
        assert of_each[chosen[example.id]] == pytest.approx(max(of_each), abs=1e-5)


@pytest.mark.parametrize(("family", "task"), [("Vilt", "vqav2"), ("Meter", "nlvr2")])
def test_a_reduced_model_learns_from_an_unreduced_teacher(family, task, tokenizer, tmp_path):
    base = write_recipe(
        tmp_path / "base.yaml",
        family,
        task,
        tokenizer,
        changes={"reducer": None, "eval_split": None},
    )
    assert main(["train", "--config", base, "--output", str(tmp_path / "base")]) == 0
    teacher = tmp_path / "base/model"
    assert pumer.active(pumer.load(teacher)) is None
    changes = {"model": {"path": str(teacher), "max_length": 8}, "image": None}
    changes |= {"distill": {"teacher": str(teacher), "weight": 2.0}}
    student = write_recipe(tmp_path / "student.yaml", family, task, tokenizer, changes=changes)
    assert main(["train", "--config", student, "--output", str(tmp_path / "student")]) == 0
    log = json.loads((tmp_path / "student/log.json").read_text())
    steps = [row for row in log if "distill_loss" in row]
    assert len(steps) == 3
    for row in steps:
        assert row["loss"] == pytest.approx(row["task_loss"] + row["distill_loss"], abs=3e-4)
    assert steps[-1]["distill_loss"] > 0
    transforms = [
        (run / "preprocessor_config.json").read_text()
        for run in (teacher, tmp_path / "student/model")
    ]
    assert transforms[0] == transforms[1]
    assert pumer.active(pumer.load(tmp_path / "student/model")).reducer.layers == (0, 1)


@pytest.mark.parametrize("blind", ["text", "image"])
def test_what_is_hidden_in_training_leaves_no_trace(blind, tokenizer, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(DATA / "vqav2", spoilt)
    if blind == "text":
        for picture in spoilt.glob("val2014/*.png"):
            picture.write_bytes(b"no picture")
    else:
        (questions,) = spoilt.glob("*_questions.json")
        content = json.loads(questions.read_text())
        for row in content["questions"]:
            row["question"] = "Why?"
        questions.write_text(json.dumps(content))
    weights = []
    for name, root in (("whole", DATA / "vqav2"), ("spoilt", spoilt)):
        changes = {"task": TASKS["vqav2"] | {"root": str(root)}, "blind": blind}
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", "Vilt", "vqav2", tokenizer, changes=changes
        )
        out = tmp_path / f"run-{name}"
        assert main(["train", "--config", recipe, "--output", str(out)]) == 0
        assert yaml.safe_load((out / "recipe.yaml").read_text())["blind"] == blind
        weights.append(pumer.load(out / "model").state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


# --- two processes ---

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
    "OMP_NUM_THREADS": "1",
}
LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "pumer.cli",
]


def on_two(*words):
    done = subprocess.run(
        [*LAUNCH, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_where_they_stopped(tokenizer, tmp_path):
    # Plain gradient descent: Adam makes whole steps of rounding errors.
    same = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "ddp_find_unused_parameters": False,
    }
    same |= {"save_strategy": "steps", "save_steps": 2}
    two = write_recipe(tmp_path / "two.yaml", "Vilt", "vqav2", tokenizer, same)
    one = write_recipe(
        tmp_path / "one.yaml", "Vilt", "vqav2", tokenizer, same | {"per_device_train_batch_size": 4}
    )
    out = tmp_path / "two"
    on_two("train", "--config", two, "--output", str(out))
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "pumer.json",
        "tokenizer.json",
    } <= {path.name for path in (out / "model").iterdir()}
    unbroken = pumer.load(out / "model").state_dict()
    halfway = load_file(out / "checkpoint-2/model.safetensors")
    assert max((unbroken[name] - value).abs().max() for name, value in halfway.items()) > 1e-3
    found = evaluation(out)

    assert main(["train", "--config", one, "--output", str(tmp_path / "one")]) == 0
    alone = pumer.load(tmp_path / "one/model").state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(unbroken[name], value, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("eval_loss", "eval_accuracy"):
        assert found[name] == pytest.approx(evaluation(tmp_path / "one")[name], rel=1e-4)

    shutil.rmtree(out / "checkpoint-4")
    on_two("train", "--config", two, "--output", str(out), "--resume", "true")
    resumed = pumer.load(out / "model").state_dict()
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, msg=name)
