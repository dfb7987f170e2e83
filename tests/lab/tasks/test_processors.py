"""Tasks put to stock decoders through their own processors: predictions, commands, studies,
tuning."""

import json
from dataclasses import replace

import pytest
import tiny_llm
import torch
from tiny_processor import PROCESSORS, processor_of
from transformers import AutoProcessor

import pumer
from pumer.cli import main
from pumer.lab.data.images import open_image
from pumer.lab.evaluate import evaluate, predict
from pumer.lab.scenes.other_tasks import ScenesVE
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.study.evaluation import cost, load_eval_model
from pumer.lab.tasks.processors import (
    SHORT,
    ProcessorCollator,
    processor_collator,
    read_processor,
    saved_collator,
)
from pumer.lab.tasks.vqa_answers import normalize
from pumer.lab.tune.points import Bounds
from pumer.lab.tune.run import tune
from pumer.lab.tune.space import SearchGrid
from pumer.presets import read_reducer
from pumer.reducers import to_dict

SETTINGS = {"name": "scenes", "questions": 40, "image_size": 32}
TASK = Scenes(questions=40, image_size=32)
PUMER = pumer.PuMer(0.2, 0.3, 0.0, (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What transformers leaves of a model and its processor."""
    out = tmp_path_factory.mktemp("stock")
    tiny_llm.model("llava").save_pretrained(out)
    processor_of("llava").save_pretrained(out)
    return str(out)


def opened(family, monkeypatch):
    """Model and collator, with the processor as it would be read from a folder."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor_of(family))
    model = tiny_llm.model(family)
    return model, processor_collator(model, TASK, read_processor("anywhere"))


def asked_alone(model, family, example, instruction=SHORT):
    """One question, its prompt written out, without padding."""
    processor = processor_of(family)
    mark = "<image>" if family == "paligemma" else processor.chat_template.split("'")[1].strip()
    question = f"{example.text}\n{instruction}" if instruction else example.text
    text = f"{mark}{question}" if family == "paligemma" else f" {mark}  {question}  w3 "
    inputs = processor(
        text=[text], images=[[open_image(example.images[0], "it")]], return_tensors="pt"
    )
    inputs.pop("labels", None)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return normalize(
        processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


# https://numpy.org/devdocs/numpy_2_0_migration_guide.html#adapting-to-changes-in-the-copy-keyword
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("reducer", [pumer.Unreduced(), PUMER], ids=["unreduced", "PuMer"])
@pytest.mark.parametrize("family", PROCESSORS)
def test_predictions_are_those_of_questions_asked_one_by_one(family, reducer, monkeypatch):
    model, collator = opened(family, monkeypatch)
    examples = TASK.examples("test")[:5]
    with pumer.reduced(model, reducer):
        found = predict(model, examples, collator, batch_size=5).predictions
        alone = {example.id: asked_alone(model, family, example) for example in examples}
    assert found == alone
    assert (
        len(set(alone.values())) > 1 or "gemma" in family
    )  # which, as small as here, have one answer to all


def test_questions_without_instruction_and_without_look(monkeypatch):
    model, collator = opened("llava", monkeypatch)
    examples = TASK.examples("test")[:4]
    found = predict(model, examples, replace(collator, instruction="")).predictions
    assert found == {example.id: asked_alone(model, "llava", example, "") for example in examples}
    blind = replace(collator, blind="text")(examples)
    assert (blind["pixel_values"] == blind["pixel_values"][:1]).all()
    mute = replace(collator, blind="image")(examples)
    assert (mute["input_ids"] == mute["input_ids"][:1]).all()


def test_pictures_have_the_precision_of_the_model(monkeypatch):
    model, _ = opened("llava", monkeypatch)
    collator = processor_collator(model.to(torch.bfloat16), TASK, read_processor("anywhere"))
    examples = TASK.examples("test")[:2]
    assert collator(examples)["pixel_values"].dtype == torch.bfloat16
    assert evaluate(model, examples, collator).examples == 2


def test_a_stock_folder_is_evaluated_with_and_without_reducer(folder, tmp_path, capsys):
    arguments = ["eval", "--model", folder, "--task", json.dumps(SETTINGS), "--limit", "6"]
    assert main(arguments) == 0
    assert (
        main(
            [
                *arguments,
                "--samples",
                str(tmp_path / "lines"),
                "--reducer",
                '{"reducer": "fastv", "layer": 1}',
            ]
        )
        == 0
    )
    assert len((tmp_path / "lines").read_text().splitlines()) == 6
    assert main(["report", "--model", folder]) == 0

    model = pumer.apply(tiny_llm.model("llava"), PUMER)
    pumer.save(model, tmp_path / "saved")
    capsys.readouterr()
    assert main(["eval", "--model", str(tmp_path / "saved"), *arguments[3:]])
    assert "has no processor" in capsys.readouterr().err
    processor_of("llava").save_pretrained(tmp_path / "saved")
    assert main(["eval", "--model", str(tmp_path / "saved"), *arguments[3:]]) == 0
    assert isinstance(saved_collator(str(tmp_path / "saved"), model, TASK), ProcessorCollator)


def test_what_cannot_be_asked_is_refused(folder, monkeypatch, capsys):
    model, collator = opened("llava", monkeypatch)
    with pytest.raises(ValueError, match="scenes-ve has no answers in words"):
        processor_collator(model, ScenesVE(), collator.processor)
    with pytest.raises(ValueError, match="1 of 1 questions have no text"):
        collator([replace(TASK.examples("test")[0], text=" ")])
    with pytest.raises(ValueError, match="image_size is for models with an image transform"):
        load_eval_model(folder, SETTINGS, image_size=16)
    assert main(["eval", "--model", "nobody/nothing"])
    assert "nobody/nothing cannot be read as a model" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_a_study_counts_what_they_cost(family, tmp_path, monkeypatch):
    model, _ = opened(family, monkeypatch)
    model.save_pretrained(tmp_path)
    examples = TASK.examples("test")[:4]
    base = load_eval_model(str(tmp_path), SETTINGS).on(examples, 2)
    one = load_eval_model(str(tmp_path), SETTINGS, to_dict(PUMER)).on(examples, 2)
    found = cost(one, base, 4)
    assert 0 < found["gflops"] < found["unreduced_gflops"]
    tokens = json.loads(found["tokens"])
    assert tokens[0][1] > tokens[-1][1] > 0


@pytest.mark.slow
def test_the_best_setting_of_a_stock_decoder_is_found(folder, tmp_path):
    model = tiny_llm.model("llava")
    collator = saved_collator(folder, model, TASK)
    grid = SearchGrid(
        prune=[0.0, 0.2], merge=[0.0, 0.3], merge_text=[0.0], layers=[[0, 1]], tome=[0]
    )
    found = tune(
        model,
        TASK.examples("test"),
        collator,
        Bounds(memory=10**12),
        tmp_path / "out",
        grid=grid,
        batch_size=2,
    )
    assert read_reducer(str(tmp_path / "out/reducer.yaml")) == found.point.point.reducer
    assert found.point.flops_ratio > 1


def test_models_whose_batches_have_no_rows_cannot_be_tuned(tmp_path, monkeypatch):
    model, collator = opened("qwen2_vl", monkeypatch)
    with pytest.raises(ValueError, match="is not a row per example"):
        tune(
            model,
            TASK.examples("test"),
            collator,
            Bounds(speedup=1.1),
            tmp_path / "out",
            batch_size=2,
        )
    assert not (tmp_path / "out").exists()
