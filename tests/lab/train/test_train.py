"""Training: the losses, a few steps with reducer and teacher, resuming, what bad settings get."""

import json
import logging
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import model as tiny_model
from torch.nn import functional
from transformers import TrainerState, TrainingArguments, ViltForImageAndTextRetrieval

import pumer
from pumer._files import fingerprint, locked
from pumer.hub import load
from pumer.lab.data.augment import RandAugment
from pumer.lab.data.text import train_tokenizer
from pumer.lab.scenes.other_tasks import ScenesRetrieval, ScenesVE
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.train import model as start
from pumer.lab.train import precision
from pumer.lab.train import run as run_module
from pumer.lab.train.examples import Epochs, Examples
from pumer.lab.train.losses import distillation_loss, grounding_loss, matching_loss, task_loss
from pumer.lab.train.model import prepare
from pumer.lab.train.optimizer import OptimizerSettings, group_of, parameter_groups, published_names
from pumer.lab.train.precision import in_bfloat16
from pumer.lab.train.run import train
from pumer.lab.train.settings import (
    DistillSettings,
    GroundingSettings,
    ModelSettings,
    TrainSettings,
)
from pumer.lab.train.trainer import Distillation, TaskTrainer
from pumer.models.vilt import published
from pumer.models.vilt.resize import resize_patches

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 150,
    "max_position_embeddings": 24,
    "image_size": 32,
    "patch_size": 8,
}
TASK = {"name": "scenes", "questions": 24, "image_size": 32}
IMAGE = {"kind": "square", "size": 32}
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
STEPS |= {"learning_rate": 1e-3}
REDUCER = {"reducer": "pumer", "prune": 0.2, "merge": 0.3, "merge_text": 0.2, "layers": [0, 1]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [example.text for example in Scenes(questions=300, image_size=32).examples("train")[:]]
    train_tokenizer(texts, 150).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    train(
        TrainSettings(
            str(out),
            TASK | {"patch_size": 8},
            ModelSettings(tokenizer=tokenizer, config=TINY, max_length=24),
            image=IMAGE,
            grounding=GroundingSettings(1.0, 2),
            trainer=STEPS,
        )
    )
    return out


def test_distillation_loss_is_the_published_one(shared):
    data = load_file(shared / "parity/training.safetensors")
    loss = distillation_loss(data["student_logits"], data["teacher_logits"])
    torch.testing.assert_close(loss, data["logit_loss"][0], atol=1e-6, rtol=1e-5)


def test_distillation_loss_by_its_definition():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(
        distillation_loss(student, teacher, 2.0), 4 * (p * (p / q).log()).sum() / 4
    )
    assert distillation_loss(student, student).abs() < 1e-6


def test_task_loss_is_the_one_of_transformers():
    logits, scores = torch.randn(3, 7), torch.rand(3, 7)
    theirs = functional.binary_cross_entropy_with_logits(logits, scores) * 7
    torch.testing.assert_close(task_loss(logits, scores, "soft"), theirs)
    torch.testing.assert_close(
        task_loss(logits, torch.tensor([1, 2, 6]), "class"),
        functional.cross_entropy(logits, torch.tensor([1, 2, 6])),
    )


def test_grounding_loss_falls_when_the_targets_are_met():
    classes = (9, 6, 3, 3, 3)
    labels = torch.stack([torch.randint(n, (2, 5)) for n in (9, 6, 3, 30, 30, 3, 3)], -1)
    labels[..., 3:5] *= labels[..., :1] > 0
    columns = labels[..., [0, 1, 2, 5, 6]].unbind(-1)
    right = [
        functional.one_hot(column, n) * 20.0 - 10
        for column, n in zip(columns, classes, strict=True)
    ]
    middle = labels[..., 3:5] / 8
    assert grounding_loss([*right, middle], labels) < 1e-3
    for wrong in range(5):
        parts = [-part if i == wrong else part for i, part in enumerate(right)]
        assert grounding_loss([*parts, middle], labels) > 1
    assert grounding_loss([*right, middle + 1], labels) > 0.1


@pytest.mark.smoke
def test_a_run_writes_a_model_that_loads(base):
    model = load(base / "model")
    assert pumer.active(model) is None
    assert model.config.id2label[0] == Scenes().labels[0]
    log = json.loads((base / "log.json").read_text())
    assert {"task_loss", "grounding_loss", "accuracy"} <= set(log[0])
    assert yaml.safe_load((base / "recipe.yaml").read_text())["grounding"]["layer"] == 2


@pytest.mark.smoke
def test_curves_are_written_for_tensorboard(tokenizer, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra train")
    settings = ModelSettings(tokenizer=tokenizer, config=TINY, max_length=24)
    train(
        TrainSettings(
            str(tmp_path),
            TASK | {"patch_size": 8},
            settings,
            image=IMAGE,
            trainer=STEPS | {"report_to": "tensorboard"},
        )
    )
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_reducer_and_teacher_train_and_are_saved(base, tmp_path):
    metrics = train(
        TrainSettings(
            str(tmp_path / "pumer"),
            TASK,
            ModelSettings(path=str(base / "model")),
            reducer=REDUCER,
            distill=DistillSettings(teacher=str(base / "model"), weight=2.0),
            trainer=STEPS,
        )
    )
    model = load(tmp_path / "pumer/model")
    assert pumer.active(model).reducer == pumer.PuMer(0.2, 0.3, 0.2, (0, 1))
    assert 0 <= metrics["eval_accuracy"] <= 100
    log = json.loads((tmp_path / "pumer/log.json").read_text())
    assert max(row.get("distill_loss", 0) for row in log) > 0
    before, after = load(base / "model").state_dict(), model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_asked_once_teaches_what_it_does_in_every_step(base, tmp_path, monkeypatch):
    model = str(base / "model")

    def run(out, cache=None, **more):
        train(
            TrainSettings(
                str(tmp_path / out),
                TASK,
                ModelSettings(path=model),
                reducer=REDUCER,
                distill=DistillSettings(model, weight=5.0, cache=cache),
                eval_split=None,
                trainer=STEPS | {"num_train_epochs": 2, "max_steps": -1},
                **more,
            )
        )
        return load(tmp_path / out / "model").state_dict()

    cache = str(tmp_path / "teacher")
    plain, first = run("plain"), run("first", cache)
    for name, value in plain.items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-3, msg=name)
    assert any(
        not torch.equal(value, load(base / "model").state_dict()[name])
        for name, value in plain.items()
    )

    asked = []
    ask = TaskTrainer.predict
    monkeypatch.setattr(
        TaskTrainer, "predict", lambda self, examples: asked.append(1) or ask(self, examples)
    )
    second = run("second", cache)
    assert not asked
    assert all(torch.equal(second[name], value) for name, value in first.items())
    run("smaller", cache, image={"kind": "square", "size": 24})  # the teacher sees its own size
    assert not asked
    run("blind", cache, blind="text")
    assert len(asked) == 1
    assert len(list((tmp_path / "teacher").iterdir())) == 2
    with pytest.raises(ValueError, match=r"augment changes the images.*leave distill.cache out"):
        run("augmented", cache, augment=RandAugment())


def test_a_teacher_is_asked_of_all_examples_however_they_are_trained(base, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "dataloader_drop_last": True,
        "prediction_loss_only": True,
    }
    train(
        TrainSettings(
            str(tmp_path / "out"),
            TASK | {"questions": 30},
            ModelSettings(path=str(base / "model")),
            distill=DistillSettings(str(base / "model"), cache=str(tmp_path / "teacher")),
            trainer=STEPS
            | settings
            | {"per_device_train_batch_size": 7, "per_device_eval_batch_size": 7},
        )
    )
    (file,) = (tmp_path / "teacher").iterdir()
    assert len(load_file(file)["logits"]) == len(
        Scenes(questions=30, image_size=32).examples("train")
    )


def test_a_teacher_has_the_answers_of_the_student(base, tmp_path):
    other = load(base / "model")
    names = [f"{name}?" for name in other.config.id2label.values()]
    other.config.id2label = dict(enumerate(names))
    other.config.label2id = {name: number for number, name in enumerate(names)}
    pumer.save(other, tmp_path / "other")
    model = ModelSettings(path=str(base / "model"))
    with pytest.raises(ValueError, match="28 answers, the student 28, others: distil from a model"):
        train(
            TrainSettings(
                str(tmp_path / "x"),
                TASK,
                model,
                distill=DistillSettings(str(tmp_path / "other")),
                trainer=STEPS,
            )
        )
    assert not (tmp_path / "x").exists()


def test_a_models_fingerprint_is_of_its_weights(tmp_path):
    files = ["config.json", "pytorch_model.bin", "chat_template.jinja"]
    for name in files:
        (tmp_path / name).write_bytes(b"one")
    seen = {fingerprint(tmp_path)}
    for name in files:
        (tmp_path / name).write_bytes(b"two")
        seen.add(fingerprint(tmp_path))
    (tmp_path / "training.log").write_bytes(b"one")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 4
    assert fingerprint(tmp_path / "pytorch_model.bin") != fingerprint(tmp_path / "config.json")


def test_a_resumed_run_ends_where_an_unbroken_one_does(base, tmp_path):
    def run(out, steps, resume=False):
        train(
            TrainSettings(
                str(tmp_path / out),
                TASK,
                ModelSettings(path=str(base / "model")),
                reducer=REDUCER,
                augment=RandAugment(),
                optimizer=OptimizerSettings(head_lr_multiplier=10),
                eval_split=None,
                resume=resume,
                trainer=STEPS
                | {"max_steps": steps, "save_steps": 3, "lr_scheduler_type": "constant"},
            )
        )
        return load(tmp_path / out / "model").state_dict()

    unbroken = run("unbroken", 6)
    run("broken", 3)
    (tmp_path / "broken/checkpoint-9").mkdir()  # what a kill in the middle of writing it leaves
    for path in sorted((tmp_path / "broken/model").iterdir(), reverse=True):
        path.unlink()
    resumed = run("broken", 6, resume=True)
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_a_folder_that_another_process_trains_in(base, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_WAIT", 0.0)
    with (
        locked(tmp_path / "out"),
        pytest.raises(ValueError, match=r"another process works in .*out"),
    ):
        train(
            TrainSettings(
                str(tmp_path / "out"), TASK, ModelSettings(path=str(base / "model")), trainer=STEPS
            )
        )


def test_bad_settings_are_refused_before_anything_is_written(base, tmp_path, tokenizer):
    model = ModelSettings(path=str(base / "model"))
    with pytest.raises(ValueError, match="not empty"):
        train(TrainSettings(str(base), TASK, model, trainer=STEPS))
    with pytest.raises(ValueError, match="a new model needs"):
        train(TrainSettings(str(tmp_path / "x"), TASK, ModelSettings(config=TINY), image=IMAGE))
    with pytest.raises(ValueError, match="without a reducer"):
        train(
            TrainSettings(
                str(tmp_path / "x"),
                TASK,
                model,
                reducer=REDUCER,
                grounding=GroundingSettings(1.0, 2),
            )
        )
    with pytest.raises(ValueError, match="`augment` and `grounding` cannot be combined"):
        train(
            TrainSettings(
                str(tmp_path / "x"),
                TASK,
                model,
                augment=RandAugment(),
                grounding=GroundingSettings(1.0, 2),
            )
        )
    with pytest.raises(ValueError, match="`optimizer` and `grounding` cannot be combined"):
        train(
            TrainSettings(
                str(tmp_path / "x"),
                TASK,
                model,
                optimizer=OptimizerSettings(),
                grounding=GroundingSettings(1.0, 2),
            )
        )
    for trainer, message in (
        ({"nothing": 1}, "trainer has no setting nothing"),
        ({"seed": 3}, r"trainer\.seed is set by train itself"),
        ({"label_smoothing_factor": 0.1}, "leave trainer.label_smoothing_factor out"),
        (
            {"dataloader_persistent_workers": True},
            "leave trainer.dataloader_persistent_workers out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(
                TrainSettings(
                    str(tmp_path / "x"), TASK, model, augment=RandAugment(), trainer=STEPS | trainer
                )
            )
    trims = {"reducer": "smarttrim", "layers": [1]}
    with pytest.raises(
        ValueError, match=r"distils from itself.*leave trainer.gradient_checkpointing out"
    ):
        train(
            TrainSettings(
                str(tmp_path / "x"),
                TASK,
                model,
                reducer=trims,
                trainer=STEPS | {"gradient_checkpointing": True},
            )
        )
    (tmp_path / "done/model").mkdir(parents=True)
    with pytest.raises(ValueError, match="a finished model and no checkpoint"):
        train(TrainSettings(str(tmp_path / "done"), TASK, model, resume=True, trainer=STEPS))
    with pytest.raises(ValueError, match="no task is named"):
        train(TrainSettings(str(tmp_path / "x"), {"name": "nothing"}, model))
    with pytest.raises(ValueError, match="not a model folder"):
        train(TrainSettings(str(tmp_path / "x"), TASK, ModelSettings(path=str(tmp_path / "none"))))
    assert not (tmp_path / "x").exists()


def test_resized_patches_see_the_same_in_an_enlarged_picture(base):
    model = load(base / "model")
    small = torch.randn(1, 3, 4, 4)
    embed = model.vilt.embeddings.patch_embeddings
    resized = resize_patches(model, 4).vilt.embeddings
    large = functional.interpolate(small, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(resized.patch_embeddings(small), embed(large), atol=1e-5, rtol=1e-4)
    assert resized.position_embeddings.shape[1] == 65
    corner = model.vilt.embeddings.position_embeddings[0, [1, 4, 13, 16]]
    torch.testing.assert_close(resized.position_embeddings[0, [1, 8, 57, 64]], corner)
    with pytest.raises(ValueError, match="whole number of patches"):
        resize_patches(model, 7)


def test_every_epoch_is_augmented_in_another_way():
    plain = Scenes(questions=4, image_size=32).examples("train")
    augmented = Examples(plain, RandAugment(), seed=1)

    def pictures(examples):
        return [np.asarray(example.images[0]) for example in examples.__getitems__([0, 1, 2, 3])]

    first = pictures(augmented)
    np.testing.assert_array_equal(
        first, [np.asarray(augmented[number].images[0]) for number in range(4)]
    )
    augmented.epoch = 1
    for others in (
        pictures(augmented),
        pictures(Examples(plain, RandAugment(), seed=2)),
        pictures(Examples(plain)),
    ):
        assert (
            sum(not np.array_equal(one, other) for one, other in zip(first, others, strict=True))
            >= 3
        )
    assert augmented[2].target == plain[2].target


def test_training_tells_the_examples_their_epoch_and_evaluation_shows_them_as_they_are(
    base, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        Examples, "_augmented", lambda self, i, example: shown.append((self.epoch, i)) or example
    )
    task = TASK | {"questions": 4}
    settings = STEPS | {"max_steps": 3}
    train(
        TrainSettings(
            str(tmp_path / "x"),
            task,
            ModelSettings(path=str(base / "model")),
            augment=RandAugment(),
            trainer=settings,
        )
    )
    assert sorted(shown) == [(epoch, number) for epoch in range(3) for number in range(4)]


# --- ranking texts ---


def test_ranking_losses_are_the_published_ones(shared):
    data = load_file(shared / "parity/vilt_irtr.safetensors")
    settings = json.loads((shared / "parity/vilt_irtr.json").read_text())
    weights = {name[8:]: value for name, value in data.items() if name.startswith("weights.")}
    model = ViltForImageAndTextRetrieval(
        published.model_config(
            settings["config"] | {"pos_grid": settings["extra"]["pos_grid"]}, weights
        )
    ).eval()
    model.load_state_dict(published.LAYOUT.to_ours(weights), strict=False)
    texts = {"input_ids": data["inputs.text_ids"], "attention_mask": data["inputs.text_masks"]}
    texts = {
        name: torch.stack([rows, rows.roll(1, 0)], 1).flatten(0, 1) for name, rows in texts.items()
    }
    with torch.no_grad():
        pooled = model.vilt(
            **texts, pixel_values=data["inputs.pixel_values"].repeat_interleave(2, 0)
        ).pooler_output
        logits = model.rank_output(pooled)
    torch.testing.assert_close(logits, data["train5d.base.logits"], atol=1e-4, rtol=1e-4)
    own = torch.zeros(3, dtype=torch.int64)
    rank = task_loss(logits.view(3, 2), own, "rank")
    torch.testing.assert_close(rank, data["train5d.base.rank_loss"][0], atol=1e-4, rtol=1e-4)
    itm = functional.linear(pooled, weights["itm_score.fc.weight"], weights["itm_score.fc.bias"])
    torch.testing.assert_close(
        matching_loss(itm, own), data["train5d.base.itm_loss"][0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["ViltForImageAndTextRetrieval", "MeterForImageAndTextRetrieval"])
def test_texts_are_ranked_per_image(kind, tmp_path, monkeypatch):
    model, teacher = (pumer.apply(tiny_model(kind), pumer.Unreduced()) for _ in range(2))
    for net, factor in ((model, 20), (teacher, 40)):  # scores far enough apart to tell
        net.rank_output.weight.data *= factor
        net.rank_output.bias.data *= factor
    texts = {
        "input_ids": torch.randint(3, 50, (6, 8)),
        "attention_mask": torch.ones(6, 8, dtype=torch.int64),
    }
    pictures = {
        "pixel_values": torch.randn(2, 3, 96, 96),
        "pixel_mask": torch.ones(2, 96, 96, dtype=torch.int64),
    }
    own = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        pairs = model(
            **texts, **{name: value.repeat_interleave(3, 0) for name, value in pictures.items()}
        )
    expected = functional.cross_entropy(pairs.logits.view(2, 3), own)
    if "itm_logits" in pairs:
        yes = torch.tensor([1, 0, 0, 1, 0, 0])
        expected = expected + 0.25 * functional.cross_entropy(pairs.itm_logits, yes)
        encode, seen = model.base_model.encode_image, []
        monkeypatch.setattr(
            model.base_model, "encode_image", lambda *a: seen.append(len(a[0])) or encode(*a)
        )

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = TaskTrainer(
        model,
        arguments,
        task=ScenesRetrieval(),
        distillation=Distillation(teacher, weight=2.0),
        itm_weight=0.25,
    )
    batch = {**texts, **pictures, "texts_per_image": 3, "labels": own}
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    torch.testing.assert_close(outputs["logits"], pairs.logits.view(2, 3), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    if "itm_logits" in pairs:
        assert seen == [2]  # the vision tower sees every picture once, not with every text

    for module in model.modules():
        module.training = isinstance(module, type(model))  # training, but without dropout
    distilled = distillation_loss(outputs["logits"], 2 * outputs["logits"])
    assert distilled > 1e-3
    torch.testing.assert_close(
        trainer.compute_loss(model, dict(batch)), expected + 2 * distilled, atol=1e-4, rtol=1e-3
    )


def test_retrieval_trains_with_reducer_and_teacher(base, tmp_path):
    task = {"name": "scenes-retrieval", "questions": 12, "negatives": 3, "image_size": 32}
    model = ModelSettings(
        path=str(base / "model"), kind="ViltForImageAndTextRetrieval", max_length=24
    )
    train(TrainSettings(str(tmp_path / "base"), task, model, eval_split=None, trainer=STEPS))
    trained = str(tmp_path / "base/model")
    metrics = train(
        TrainSettings(
            str(tmp_path / "pumer"),
            task,
            ModelSettings(path=trained, max_length=24),
            reducer=REDUCER,
            distill=DistillSettings(trained),
            trainer=STEPS,
        )
    )
    right = metrics["eval_accuracy"] * 12 / 100
    assert right == pytest.approx(round(right), abs=1e-4)
    assert "distill_loss" in json.loads((tmp_path / "pumer/log.json").read_text())[0]
    assert type(load(tmp_path / "pumer/model")) is ViltForImageAndTextRetrieval


def test_texts_are_drawn_anew_for_each_epoch():
    task = ScenesRetrieval(questions=4, negatives=2, image_size=32)
    examples = Examples(task.examples("train"))
    epochs = Epochs(examples, task, "train")

    def texts(epoch):
        epochs.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        return [
            (example.text, example.negatives) for example in examples.__getitems__([0, 1, 2, 3])
        ]

    assert texts(0) == [(example.text, example.negatives) for example in task.examples("train")[:]]
    assert len(set(texts(0)) & set(texts(1.0))) < 2
    assert texts(2.5) == texts(2.0) != texts(1.0)


METER = {
    "text_config": {
        "vocab_size": 150,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 25,
        "pad_token_id": 0,
        "type_vocab_size": 1,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    },
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def test_a_new_meter_trains_on_retrieval_in_published_groups(tokenizer, tmp_path):
    train(
        TrainSettings(
            str(tmp_path / "meter"),
            {"name": "scenes-retrieval", "questions": 8, "negatives": 2, "image_size": 32},
            ModelSettings(
                kind="MeterForImageAndTextRetrieval",
                tokenizer=tokenizer,
                config=METER,
                max_length=24,
            ),
            image=IMAGE,
            reducer={
                "reducer": "pumer",
                "prune": 0.2,
                "merge": 0.3,
                "merge_text": 0.2,
                "layers": [0, 1],
            },
            optimizer=OptimizerSettings(fusion_lr_multiplier=5),
            eval_split=None,
            trainer=STEPS | {"max_steps": 2, "save_steps": 2, "weight_decay": 0.01},
        )
    )
    log = json.loads((tmp_path / "meter/log.json").read_text())
    assert log[0]["loss"] == pytest.approx(log[0]["task_loss"] + log[0]["itm_loss"], abs=2e-4)
    groups = torch.load(tmp_path / "meter/checkpoint-2/optimizer.pt")["param_groups"]
    rates = {(group["initial_lr"], group["weight_decay"]) for group in groups}
    assert rates == {(1e-3, 0.01), (1e-3, 0.0), (5e-3, 0.01), (5e-3, 0.0)}
    assert pumer.active(load(tmp_path / "meter/model")).reducer.layers == (0, 1)


def test_a_new_meter_pads_as_its_tokenizer_does(tokenizer):
    config = METER | {"text_config": METER["text_config"] | {"pad_token_id": 1}}
    settings = ModelSettings(
        kind="MeterForQuestionAnswering", tokenizer=tokenizer, config=config, max_length=24
    )
    with pytest.raises(
        ValueError, match="the tokenizer pads with 0, the model's text encoder takes 1"
    ):
        prepare(settings, TASK)


# --- what a training starts from ---


def settings_for(base, kind=None, **more):
    return ModelSettings(path=str(base / "model"), kind=kind, **more)


def trunk(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith("vilt.")}


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("ViltForImagesAndTextClassification", "scenes-nlvr2", "classifier"),
        ("ViltForVisualEntailment", "scenes-ve", "classifier"),
        ("ViltForImageAndTextRetrieval", "scenes-retrieval", "rank_output"),
    ],
)
def test_a_new_head_on_a_trained_trunk(base, caplog, kind, task, head):
    with caplog.at_level(logging.WARNING):
        net, _, built = prepare(settings_for(base, kind), {"name": task})
    assert type(net).__name__ == kind
    before, after = trunk(load(base / "model")), trunk(net)
    types = "vilt.embeddings.token_type_embeddings.weight"
    if built.image_count == 2:
        assert (net.config.num_images, net.config.modality_type_vocab_size) == (2, 3)
        torch.testing.assert_close(after[types], before[types][[0, 1, 1]])
        before.pop(types)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    started = caplog.text.split("start anew: ")[1].strip().split(", ")
    assert {name.split(".")[0] for name in started} == {head}
    if head == "classifier":
        assert tuple(net.config.id2label.values()) == built.labels


def test_heads_stay_where_class_and_labels_do(base, caplog):
    trained = load(base / "model").state_dict()
    same, _, _ = prepare(settings_for(base, "ViltForQuestionAnswering"), TASK)
    changed, _, _ = prepare(settings_for(base, config={"hidden_dropout_prob": 0.3}), TASK)
    for net in (same, changed):
        assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert changed.vilt.embeddings.dropout.p == 0.3
    assert "start anew" not in caplog.text
    other, _, _ = prepare(settings_for(base, "ViltForVisualEntailment"), {"name": "scenes-ve"})
    # Its first layer has the same shape; half a head of another task is no start.
    assert not torch.equal(other.classifier[0].weight, trained["classifier.0.weight"])
    other.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    again = start.rebuild(other, type(other), ScenesVE(), {})
    # The same labels in another order: the head stays, and the collator matches them by name.
    assert list(again.config.id2label.values()) == ["entailment", "neutral", "contradiction"]
    assert torch.equal(again.classifier[3].weight, other.classifier[3].weight)
    other.config.id2label = {0: "yes", 1: "perhaps", 2: "no"}
    again = start.rebuild(other, type(other), ScenesVE(), {})
    assert list(again.config.id2label.values()) == ["contradiction", "neutral", "entailment"]
    assert not torch.equal(again.classifier[3].weight, other.classifier[3].weight)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"kind": "MeterForQuestionAnswering"}, "scenes", "class of its family"),
        ({"kind": "ViltForEverything"}, "scenes", "no|neither"),
        ({"config": {"depth": 3}}, "scenes", "ViltConfig has no setting depth"),
        ({"config": {"intermediate_size": 50}}, "scenes", "other shapes"),
        ({"image_size": 48}, "scenes", "published checkpoints"),
        ({}, "scenes-nlvr2", "has 2 images per example: take a ViltForImagesAndTextClassification"),
        ({}, "scenes-retrieval", "ranks texts: take a ViltForImageAndTextRetrieval"),
        ({"kind": "ViltForImageAndTextRetrieval"}, "scenes", "take a ViltForQuestionAnswering"),
    ],
)
def test_settings_that_do_not_fit_each_other(base, settings, task, message):
    with pytest.raises(ValueError, match=message):
        prepare(settings_for(base, **settings), {"name": task})


def test_a_published_pretraining_is_a_start(tokenizer, tmp_path):
    pretrained = tiny_model("ViltForMaskedLM", image_size=96)
    matching = {"itm_score.fc.weight": torch.randn(2, 32), "itm_score.fc.bias": torch.randn(2)}
    state = published.LAYOUT.from_ours(pretrained.state_dict()) | matching
    save_file(
        {name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": 4, "pos_grid": [6, 6], "drop_rate": 0.2})
    )
    settings = ModelSettings(
        path=str(tmp_path), tokenizer=tokenizer, kind="ViltForImageAndTextRetrieval"
    )
    with pytest.warns(UserWarning, match="itm_score"):
        ranking, _, _ = prepare(settings, {"name": "scenes-retrieval"})
    torch.testing.assert_close(ranking.rank_output.weight, matching["itm_score.fc.weight"][1:])
    torch.testing.assert_close(ranking.rank_output.bias, matching["itm_score.fc.bias"][1:])
    settings.kind = "ViltForQuestionAnswering"
    with pytest.warns(UserWarning, match="itm_score"):
        answering, _, _ = prepare(settings, TASK)
    for net in (ranking, answering):
        torch.testing.assert_close(trunk(net), trunk(pretrained))
        # The published dropout, on the text embeddings alone.
        assert net.vilt.embeddings.text_embeddings.dropout.p == 0.2
        assert net.vilt.embeddings.dropout.p == 0
    assert list(answering.config.id2label.values()) == list(Scenes().labels)


# --- the published optimizer ---

KINDS = {
    "vqa2": "ForQuestionAnswering",
    "nlvr2": "ForImagesAndTextClassification",
    "ve": "ForVisualEntailment",
    "irtr": "ForImageAndTextRetrieval",
}
CASES = [f"{family}_{task}" for family in ("vilt", "meter") for task in KINDS]


def published_groups(shared, case):
    data = json.loads((shared / "parity/training.json").read_text())["optimizer_groups"]["groups"]
    assert sorted(data) == sorted(CASES)
    return {
        name: (group["lr_mult"], group["weight_decay"])
        for group in data[case]
        for name in group["params"]
    }


@pytest.mark.parametrize("case", CASES)
def test_groups_are_the_published_ones(shared, case):
    multiplier = {"trunk": 1, "fusion": 5, "head": 50}
    for name, expected in published_groups(shared, case).items():
        part, decays = group_of(name)
        assert (multiplier[part], 0.01 * decays) == expected, name


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_in_the_group_of_its_published_name(shared, case):
    family, task = case.split("_")
    model = pumer.apply(tiny_model(family.capitalize() + KINDS[task]), pumer.Unreduced())
    expected, names = published_groups(shared, case), published_names(model)
    first = {
        name
        for name in names.values()
        if not re.search(r"\.(layer|\w*blocks|\w+_layers)\.[1-9]", name)
    }
    without = {name for name in expected if name.startswith("itm_score") and family == "vilt"}
    assert first == set(expected) - without
    settings = OptimizerSettings(head_lr_multiplier=50, fusion_lr_multiplier=5)
    groups = parameter_groups(model, settings, learning_rate=1e-4, weight_decay=0.01)
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    )
    for name, parameter in model.named_parameters():
        if names[name] in expected:
            multiplier, decay = expected[names[name]]
            assert found[id(parameter)] == pytest.approx((1e-4 * multiplier, decay)), name


def test_models_without_published_names_have_no_groups():
    with pytest.raises(ValueError, match="does not support ViltForTokenClassification"):
        published_names(tiny_model("ViltForTokenClassification"))


def test_bfloat16_is_for_machines_that_have_it(monkeypatch):
    for emulated, wanted in ((True, False), (False, True)):
        monkeypatch.setattr(precision, "_emulated", lambda emulated=emulated: emulated)
        assert in_bfloat16({"bf16": True, "use_cpu": True}) is wanted
        assert in_bfloat16({"bf16": True, "use_cpu": False}) is True
        assert in_bfloat16({"use_cpu": True}) is False


def test_a_training_says_that_it_leaves_bfloat16_out(base, tmp_path, monkeypatch, caplog):
    used = []
    monkeypatch.setattr(precision, "_emulated", lambda: True)
    monkeypatch.setattr(TaskTrainer, "train", lambda self, **_: used.append(self.args.bf16))
    steps = STEPS | {"bf16": True, "use_cpu": True}
    train(
        TrainSettings(
            str(tmp_path / "run"),
            TASK,
            ModelSettings(path=str(base / "model")),
            eval_split=None,
            trainer=steps,
        )
    )
    assert used == [False]
    assert "training in float32" in caplog.text
    assert (
        yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["trainer"]["bf16"] is True
    )  # as it was given
