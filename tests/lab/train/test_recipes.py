"""Every recipe, shipped or of the benchmarks: read as the command line reads it, made of names and
settings that exist."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from transformers import TrainingArguments, get_scheduler

import pumer.lab.train
from pumer import PuMer
from pumer._shipped import shipped_models
from pumer.hub import model_class
from pumer.lab.data.augment import RandAugment
from pumer.lab.data.transforms import build_transform
from pumer.lab.tasks import get
from pumer.lab.train.model import ModelSettings
from pumer.lab.train.optimizer import OptimizerSettings
from pumer.lab.train.settings import TrainSettings
from pumer.presets import PRESETS, read_reducer

SHIPPED = Path(pumer.lab.train.__file__).parent / "recipes"
BENCHMARKS = Path(__file__).parents[3] / "benchmarks" / "recipes"
FILES = {path.stem: path for folder in (SHIPPED, BENCHMARKS) for path in folder.glob("*.yaml")}
RECIPES = sorted(FILES)
PUBLISHED = [name for name in RECIPES if name.startswith("published-")]


def read(name, *more):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainSettings, as_positional=False)
    return parser.instantiate(
        parser.parse_args(["--config", str(FILES[name]), "--output", "out", *more])
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_what_there_is(name, tmp_path):
    settings = read(name)
    task = get(settings.task["name"])
    assert set(settings.task) - {"name"} <= {field.name for field in fields(task)}
    assert isinstance(settings.model, ModelSettings)
    if settings.model.kind:
        kind = model_class(settings.model.kind)
        assert kind.__name__.endswith("ForImagesAndTextClassification") == (task.image_count > 1)
        assert kind.__name__.endswith("ForImageAndTextRetrieval") == (task.loss_kind == "rank")
    if settings.reducer:
        read_reducer(settings.reducer)
    build_transform(settings.image)
    arguments = TrainingArguments(str(tmp_path), **settings.trainer | {"bf16": False})
    assert arguments.num_train_epochs >= 1
    first = yaml.safe_load(FILES[name].read_text())
    assert set(first) <= {"output", *vars(settings)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_in_a_recipe_name_it_and_what_it_starts_from(name):
    text = FILES[name].read_text()
    shipped = FILES[name].parent == SHIPPED
    assert f"--config {name if shipped else f'benchmarks/recipes/{name}.yaml'} " in text
    path = read(name).model.path
    if path and path.startswith("runs/"):
        assert path.split("/")[1] in RECIPES
    elif path and name not in PUBLISHED:
        assert path in shipped_models()


def test_recipes_and_reducers_share_no_name():
    """The command line puts a recipe's file in place of its name, wherever that stands."""
    assert not set(RECIPES) & set(PRESETS)


PAPER = {  # reference.md, section b
    "vilt-vqav2": (384, 32, 64, 1e-4, 10, 1),
    "vilt-nlvr2": (384, 40, 32, 1e-4, 10, 1),
    "vilt-snli-ve": (384, 40, 64, 1e-4, 10, 1),
    "vilt-retrieval": (384, 40, 32, 1e-4, 1, 1),
    "meter-vqav2": (384, 32, 24, 5e-6, 50, 5),
    "meter-nlvr2": (288, 40, 12, 5e-6, 50, 5),
    "meter-snli-ve": (384, 40, 24, 2e-6, 10, 5),
    "meter-retrieval": (384, 40, 64, 5e-6, 1, 5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name, tmp_path):
    settings = read(name)
    family_task = name.removeprefix("published-")
    size, length, batch, rate, head, fusion = PAPER[family_task]
    trainer = TrainingArguments(str(tmp_path), **settings.trainer)
    assert settings.model.max_length == length
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == batch
    assert (trainer.learning_rate, trainer.num_train_epochs) == (rate, 10)
    assert settings.optimizer == OptimizerSettings(head, fusion)
    assert settings.augment == RandAugment(2, 9)
    adam = (
        trainer.adam_beta1,
        trainer.adam_beta2,
        trainer.adam_epsilon,
        trainer.weight_decay,
        trainer.max_grad_norm,
    )
    assert adam == (0.9, 0.98, 1e-8, 0.01, 0)
    transform = build_transform(settings.image)
    clip = family_task.startswith("meter")
    assert (transform.size, transform.resample.name) == (size, "BICUBIC" if clip else "BILINEAR")
    assert transform.mean == ((0.48145466, 0.4578275, 0.40821073) if clip else (0.5, 0.5, 0.5))
    assert transform.std == ((0.26862954, 0.26130258, 0.27577711) if clip else (0.5, 0.5, 0.5))
    assert settings.model.kind.startswith("Meter" if clip else "Vilt")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_second_step_of_a_published_recipe_adds_reducer_and_teacher(name):
    steps = [line for line in FILES[name].read_text().splitlines() if line.startswith("#   --")]
    settings = read(name, *" ".join(steps).replace("#", "").split())
    assert settings.distill.teacher == f"runs/{name.removeprefix('published-')}/model"
    assert settings.distill.weight == (3129 if "vqav2" in name else 1)
    assert isinstance(read_reducer(settings.reducer), PuMer)
    assert settings.trainer["num_train_epochs"] == 20
    assert settings.trainer["learning_rate"] == PAPER[name.removeprefix("published-")][3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedule(name, shared, tmp_path):
    expected = json.loads((shared / "parity/training.json").read_text())["lr_schedule"]
    trainer = TrainingArguments(str(tmp_path), **read(name).trainer)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=expected["lr"])
    schedule = get_scheduler(
        trainer.lr_scheduler_type,
        optimizer,
        trainer.get_warmup_steps(expected["total_steps"]),
        expected["total_steps"],
        trainer.lr_scheduler_kwargs,
    )
    rates = []
    for _ in expected["values"]:
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected["values"], abs=1e-12)
