"""What comes with the package: models that load and answer, photographs with their rights, recipes
that fit."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import pumer
from pumer._shipped import SHIPPED, shipped_models
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.data.images import open_image
from pumer.lab.evaluate import evaluate
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.train.settings import ModelSettings, TrainSettings

RECIPES = sorted(
    [
        *(SHIPPED.parent / "lab" / "train" / "recipes").glob("*.yaml"),
        *(Path(__file__).parents[2] / "benchmarks" / "recipes").glob("*.yaml"),
    ]
)


def test_it_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 12e6


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_answer_unseen_questions(name):
    model = open_model(name, None)
    assert (pumer.active(model) is not None) == name.endswith("pumer")
    collator = open_task(name, model, {"name": "scenes"})
    examples = Scenes(questions=200, seed=11).examples("test")[:]
    assert evaluate(model, examples, collator).metric["accuracy"] > 80


def test_photographs_open_and_say_whose_they_are():
    rows = json.loads((SHIPPED / "photos" / "photos.json").read_text())
    assert len(rows) == 8
    for row in rows:
        assert "U.S. Government work" in row["rights"]
        assert row["caption"]
        assert max(open_image(SHIPPED / "photos" / row["file"]).size) >= 600


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_settings_that_exist(recipe):
    settings = yaml.safe_load(recipe.read_text())
    known = TrainSettings.__dataclass_fields__
    assert set(settings) <= set(known)
    assert set(settings["model"]) <= set(ModelSettings.__dataclass_fields__)
    if "reducer" in settings:
        pumer.reducers.from_dict(settings["reducer"])
    TrainingArguments(output_dir="unused", **{"use_cpu": True, **settings["trainer"]})
