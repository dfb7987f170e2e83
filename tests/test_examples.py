"""The notebooks and scripts under examples/."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_llm
from PIL import Image
from tiny_processor import processor_of

import pumer
from pumer.cli import main
from pumer.lab.tasks.check import check_files
from pumer.lab.tasks.vqav2 import VQAv2
from pumer.reducers import registry

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHAPES = ("circle", "triangle", "rectangle")


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks_print_the_numbers_that_they_show(path, monkeypatch, tmp_path):
    """Run it again where this fails: `jupyter nbconvert --to notebook --execute --inplace`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REDUCERS", dict(registry._REDUCERS))
    namespace = {"__name__": "notebook"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
        outputs = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        shown = "".join(line for output in outputs for line in output["text"])
        assert numbers(printed.getvalue()) == numbers(shown)
        assert bool(printed.getvalue()) == bool(shown)


def test_notebooks_are_three_small_files():
    assert {path.stem for path in NOTEBOOKS} == {"encoder", "decoder", "own_reducer"}
    assert all(path.stat().st_size < 100_000 for path in NOTEBOOKS)


@pytest.fixture
def easy_vqa(tmp_path, monkeypatch):
    """The package's own functions, of twelve images to train on and two to test on."""
    paths = {number: tmp_path / "package" / f"{number}.png" for number in range(12)}
    paths[0].parent.mkdir()
    for path in paths.values():
        Image.new("RGB", (8, 8), "teal").save(path)

    def questions(images):
        shapes = [(image, SHAPES[image % 3]) for image in images]
        rows = [("what shape is in the image?", shape, image) for image, shape in shapes]
        rows += [("is there a circle?", "yes" if s == "circle" else "no", i) for i, s in shapes]
        return tuple(map(list, zip(*rows, strict=True)))

    package = SimpleNamespace(
        get_train_questions=lambda: questions(range(12)),
        get_train_image_paths=lambda: paths,
        get_test_questions=lambda: questions(range(2)),
        get_test_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)


def convert(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["easy_vqa_files.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "easy_vqa_files.py"), run_name="__main__")


def test_easy_vqa_in_official_files(easy_vqa, monkeypatch, tmp_path, capsys):
    out = tmp_path / "data" / "easy-vqa"
    convert(monkeypatch, out, "--test")
    assert capsys.readouterr().out.splitlines() == [
        "train: 9 images, 18 questions",
        "val: 3 images, 6 questions",
        "test: 2 images, 4 questions",
    ]
    assert [(check.name, check.complete) for check in check_files("vqav2", out, decode=True)] == [
        ("test", True),
        ("train", True),
        ("val", True),
    ]
    train, val = (VQAv2(out).examples(split) for split in ("train", "val"))
    assert {example.cluster for example in val} == {0, 5, 10}
    assert {example.cluster for example in train} == set(range(12)) - {0, 5, 10}
    example = {example.id: example for example in val}[5001]
    assert (example.text, example.target) == ("is there a circle?", {"no": 1.0})
    assert example.meta["answer_type"] == "yes/no"


@pytest.mark.parametrize("words", [[], ["--test"]])
def test_easy_vqa_overwrites_nothing(easy_vqa, monkeypatch, tmp_path, capsys, words):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        convert(monkeypatch, tmp_path / "out", *words)
    assert "out exists: give another folder" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def test_without_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SystemExit):
        convert(monkeypatch, tmp_path / "out")
    assert "pip install easy-vqa" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare_answers.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "compare_answers.py"), run_name="__main__")


def test_answers_of_a_classifier_side_by_side(monkeypatch, tmp_path, capsys):
    Image.new("RGB", (96, 96), "teal").save(tmp_path / "image.png")
    compare(monkeypatch, "scenes-vilt", tmp_path / "image.png", "is there a circle?")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["unreduced:", "no"],
        ["pumer:", "no"],
        ["random:", "no"],
    ]
    assert all("times fewer FLOPs" in line for line in lines[1:])


def test_answers_of_a_language_model_side_by_side(monkeypatch, tmp_path, capsys):
    tiny_llm.model("llava").save_pretrained(tmp_path)
    processor_of("llava").save_pretrained(tmp_path)
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "image.png")
    settings = '{"reducer": "divprune", "keep": 0.25}'
    compare(monkeypatch, tmp_path, tmp_path / "image.png", "w4 w5", "--reducers", settings)
    unreduced, reduced = capsys.readouterr().out.splitlines()
    words = re.fullmatch(r"unreduced: (w\d+(?: w\d+)*)", unreduced)[1]
    assert reduced.startswith(f"{settings}: w")
    assert words not in reduced  # random weights notice which tokens are gone


@pytest.mark.slow
def test_the_worked_example_trains_and_evaluates(easy_vqa, monkeypatch, tmp_path):
    """docs/training.md in small: a new list of answers, PuMer taught by that model, both scored."""
    data, base, reduced = tmp_path / "data", tmp_path / "base", tmp_path / "pumer"
    convert(monkeypatch, data)
    small = ["--trainer.max_steps", "1", "--trainer.per_device_train_batch_size", "2"]
    train = ["train", "--config", str(EXAMPLES / "easy_vqa.yaml"), "--task.root", str(data), *small]
    reducer = '{"reducer": "pumer", "prune": 0.1, "merge": 0.3, "layers": [1, 2, 3]}'
    first = f"{base}/model"
    assert main([*train, "--output", str(base)]) == 0
    more = ["--model.path", first, "--distill.teacher", first, "--reducer", reducer]
    assert main([*train, *more, "--output", str(reduced)]) == 0
    model = pumer.load(reduced / "model")
    assert {*model.config.id2label.values()} == {*SHAPES, "no", "yes"}
    assert pumer.active(model).reducer.prune == 0.1
    record = tmp_path / "rows.csv"
    task = ["--task", "vqav2", "--task.root", str(data), "--split", "val", "--record", str(record)]
    assert main(["eval", "--model", f"{reduced}/model", *task]) == 0
    assert len(record.read_text().splitlines()) == 2
