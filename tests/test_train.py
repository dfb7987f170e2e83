"""Training: the losses, a few steps with reducer and teacher, resuming, what bad settings get."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional

import pumer
from pumer.data.text import train_tokenizer
from pumer.hub import load
from pumer.models.vilt.resize import resize_patches
from pumer.tasks.scenes import Scenes
from pumer.train.losses import distillation_loss, grounding_loss, task_loss
from pumer.train.run import DistillSettings, GroundingSettings, ModelSettings, train

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
        str(out),
        TASK | {"patch_size": 8},
        ModelSettings(tokenizer=tokenizer, config=TINY, max_length=24),
        image=IMAGE,
        grounding=GroundingSettings(1.0, 2),
        trainer=STEPS,
    )
    return out


def test_distillation_loss_is_the_published_one(shared):
    data = load_file(shared / "parity/training.safetensors")
    loss = distillation_loss(data["student_logits"], data["teacher_logits"])
    torch.testing.assert_close(loss, data["logit_loss"][0], atol=1e-6, rtol=1e-5)


def test_distillation_loss_by_its_definition():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), 4 * (p * (p / q).log()).sum() / 4)
    assert distillation_loss(student, student).abs() < 1e-6


def test_task_loss_is_the_one_of_transformers():
    logits, scores = torch.randn(3, 7), torch.rand(3, 7)
    theirs = functional.binary_cross_entropy_with_logits(logits, scores) * 7
    torch.testing.assert_close(task_loss(logits, scores, "soft"), theirs)
    torch.testing.assert_close(
        task_loss(logits, torch.tensor([1, 2, 6]), "class"), functional.cross_entropy(logits, torch.tensor([1, 2, 6]))
    )


def test_grounding_loss_falls_when_the_targets_are_met():
    classes = (9, 6, 3, 3, 3)
    labels = torch.stack([torch.randint(n, (2, 5)) for n in (9, 6, 3, 30, 30, 3, 3)], -1)
    labels[..., 3:5] *= labels[..., :1] > 0
    columns = labels[..., [0, 1, 2, 5, 6]].unbind(-1)
    right = [functional.one_hot(column, n) * 20.0 - 10 for column, n in zip(columns, classes, strict=True)]
    middle = labels[..., 3:5] / 8
    assert grounding_loss([*right, middle], labels) < 1e-3
    for wrong in range(5):
        parts = [-part if i == wrong else part for i, part in enumerate(right)]
        assert grounding_loss([*parts, middle], labels) > 1
    assert grounding_loss([*right, middle + 1], labels) > 0.1


def test_a_run_writes_a_model_that_loads(base):
    model = load(base / "model")
    assert pumer.active(model) is None
    assert model.config.id2label[0] == Scenes().labels[0]
    log = json.loads((base / "log.json").read_text())
    assert {"task_loss", "grounding_loss", "accuracy"} <= set(log[0])
    assert yaml.safe_load((base / "recipe.yaml").read_text())["grounding"]["layer"] == 2


def test_reducer_and_teacher_train_and_are_saved(base, tmp_path):
    metrics = train(
        str(tmp_path / "pumer"),
        TASK,
        ModelSettings(path=str(base / "model")),
        reducer=REDUCER,
        distill=DistillSettings(teacher=str(base / "model"), weight=2.0),
        trainer=STEPS,
    )
    model = load(tmp_path / "pumer/model")
    assert pumer.active(model).reducer == pumer.PuMer(0.2, 0.3, 0.2, (0, 1))
    assert 0 <= metrics["eval_accuracy"] <= 1
    log = json.loads((tmp_path / "pumer/log.json").read_text())
    assert max(row.get("distill_loss", 0) for row in log) > 0
    before, after = load(base / "model").state_dict(), model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_ends_where_an_unbroken_one_does(base, tmp_path):
    def run(out, steps, resume=False):
        settings = STEPS | {"max_steps": steps, "save_steps": 3, "lr_scheduler_type": "constant"}
        model = ModelSettings(path=str(base / "model"))
        train(str(tmp_path / out), TASK, model, reducer=REDUCER, eval_split=None, resume=resume, trainer=settings)
        return load(tmp_path / out / "model").state_dict()

    unbroken = run("unbroken", 6)
    run("broken", 3)
    for path in sorted((tmp_path / "broken/model").iterdir(), reverse=True):
        path.unlink()
    resumed = run("broken", 6, resume=True)
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_bad_settings_are_refused_before_anything_is_written(base, tmp_path, tokenizer):
    model = ModelSettings(path=str(base / "model"))
    with pytest.raises(ValueError, match="not empty"):
        train(str(base), TASK, model, trainer=STEPS)
    with pytest.raises(ValueError, match="a new model needs"):
        train(str(tmp_path / "x"), TASK, ModelSettings(config=TINY), image=IMAGE)
    with pytest.raises(ValueError, match="without a reducer"):
        train(str(tmp_path / "x"), TASK, model, reducer=REDUCER, grounding=GroundingSettings(1.0, 2))
    with pytest.raises(ValueError, match="no task is named"):
        train(str(tmp_path / "x"), {"name": "nothing"}, model)
    with pytest.raises(ValueError, match="no model folder"):
        train(str(tmp_path / "x"), TASK, ModelSettings(path=str(tmp_path / "none")))
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
