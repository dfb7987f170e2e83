"""NLVR2: reading the official files, accuracy and consistency, the prediction file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pumer.lab import tasks
from pumer.lab.data.images import BrokenImageError, Square, open_image
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.tasks import NLVR2, Collator, Example

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "nlvr2"


@pytest.fixture
def root(tmp_path):
    """A copy of the fixture to change."""
    return shutil.copytree(FIXTURE, tmp_path / "nlvr2")


def edit(path, line, change):
    """Pass line number `line` (from 1) of a file through `change`, which takes and gives a dict or
    text."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[line - 1])
    changed = change(row)
    lines[line - 1] = changed if isinstance(changed, str) else json.dumps(changed or row)
    path.write_text("\n".join(lines) + "\n")


def truth(examples):
    return {example.id: ("False", "True")[example.target] for example in examples}


def official(lines, predictions):
    """What metrics.py prints, written out again: accuracy and consistency."""
    right, consistent = 0, {}
    for line in lines:
        parts = line["identifier"].split("-")
        group = "-".join([*parts[:2], "", *parts[3:]])
        if predictions[line["identifier"]].lower() == line["label"].lower():
            right += 1
            consistent.setdefault(group, True)
        else:
            consistent[group] = False
    return right / len(lines), sum(consistent.values()) / len(consistent)


# --- reading ---


def test_reads_the_files():
    task = tasks.build({"name": "nlvr2", "root": FIXTURE})
    examples = task.examples("dev")
    assert len(examples) == 6
    assert examples[1].id == "dev-12-1-0"
    assert examples[1].text == "One image shows exactly two red balls."
    assert examples[1].target == 0
    assert [image.name for image in examples[1].images] == [
        "dev-12-1-img0.png",
        "dev-12-1-img1.png",
    ]
    assert [example.cluster for example in examples] == ["dev-12"] * 4 + ["dev-7"] * 2
    assert open_image(examples[5].images[1]).size == (48, 32)  # a JPEG under a .png name
    train = task.examples("train")
    assert [example.target for example in train] == [1, 0]
    assert train[0].images[0].parent.name == "40"
    assert task.labels == ("False", "True")


@pytest.mark.parametrize("folder", ["images/dev", "images", "dev", ""])
def test_where_images_may_be(root, tmp_path, folder):
    place = tmp_path / "elsewhere" / folder
    place.mkdir(parents=True)
    for path in (root / "dev").iterdir():
        path.rename(place / path.name)
    examples = NLVR2(root, images=tmp_path / "elsewhere").examples("dev")
    assert examples[0].images[0].parent == place


def test_another_file_by_its_path(root):
    (root / "balanced").mkdir()
    (root / "dev.json").rename(root / "balanced" / "balanced_dev.json")
    assert len(NLVR2(root).examples("balanced/balanced_dev")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: '{"identifier": ',
            r"1 of 6 rows are broken.*dev\.json:3: no JSON, Expecting value",
        ),
        (lambda row: "[]", r"dev\.json:3: a JSON object is expected, not list"),
        (lambda row: row.pop("sentence") and None, r"dev\.json:3: there is no sentence"),
        (lambda row: row | {"sentence": " "}, r"dev\.json:3: sentence is ' ', not a text"),
        (lambda row: row | {"label": True}, r"dev\.json:3: label is True, not a text"),
        (
            lambda row: row | {"label": "Maybe"},
            r"dev\.json:3: label 'Maybe' is none of False, True",
        ),
        (
            lambda row: row | {"identifier": "dev-12-0-0"},
            r"dev\.json:3: id dev-12-0-0 repeats that of .*dev\.json:1",
        ),
        (
            lambda row: row | {"identifier": "12-0-0"},
            r"dev\.json:3: identifier '12-0-0' is not of the form",
        ),
        (
            lambda row: row | {"identifier": "dev-99-0-0"},
            r"2 of 8 images \(dev-99-0-img0, dev-99-0-img1\) are not in",
        ),
    ],
)
def test_bad_lines(root, change, message):
    edit(root / "dev.json", 3, change)
    with pytest.raises(ValueError, match=message):
        NLVR2(root).examples("dev")


def test_a_file_without_labels_is_predicted_and_not_scored(root, tmp_path):
    rows = [json.loads(line) for line in (root / "dev.json").read_text().splitlines()]
    for row in rows[1:]:
        del row["label"]
    (root / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r"dev\.json: 5 of 6 rows \(dev-12-1-0, .*\) have no label"
    ):
        NLVR2(root).examples("dev")
    del rows[0]["label"]
    (root / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    task = NLVR2(root)
    examples = task.examples("dev")
    assert {example.target for example in examples} == {None}
    predictions = {example.id: "True" for example in examples}
    task.write_predictions(tmp_path / "p.csv", predictions, examples)
    assert (tmp_path / "p.csv").read_text().splitlines()[1] == "dev-12-1-0,True"
    with pytest.raises(ValueError, match="has no label; score a labelled split"):
        task.metric(predictions, examples)


def test_bad_lines_are_counted_and_five_named(root):
    (root / "dev.json").write_text("no\n\n" * 7 + "{}\n")
    with pytest.raises(
        ValueError, match=r"8 of 8 rows are broken; .*dev\.json:1: .*dev\.json:9: .*; and 3 more$"
    ):
        NLVR2(root).examples("dev")


def test_bytes_that_are_no_text(root):
    (root / "dev.json").write_bytes(b'{"identifier": "\xff"}\n')
    with pytest.raises(ValueError, match=r"dev\.json:1: .*utf-8"):
        NLVR2(root).examples("dev")


def test_missing_file(root):
    with pytest.raises(
        ValueError, match=r"test1\.json does not exist; .* has dev\.json, train\.json.*github"
    ):
        NLVR2(root).examples("test1")


# --- images that are missing or broken ---


def test_missing_images_fail_or_are_skipped(root):
    (root / "dev" / "dev-12-1-img1.png").unlink()
    with pytest.raises(ValueError, match=r'1 of 6 images \(dev-12-1-img1\) .*skip to "missing"'):
        NLVR2(root).examples("dev")
    with pytest.warns(
        UserWarning, match=r"2 of 6 examples are left out: 1 of 6 images \(dev-12-1-img1\)"
    ):
        examples = NLVR2(root, skip="missing").examples("dev")
    assert [example.id for example in examples] == [
        "dev-12-0-0",
        "dev-12-0-1",
        "dev-7-3-0",
        "dev-7-3-1",
    ]


def test_broken_images_fail_when_read_or_are_skipped(root):
    (root / "dev" / "dev-12-0-img0.png").write_bytes(b"no image")
    (root / "dev" / "dev-7-3-img1.png").unlink()
    with pytest.warns(UserWarning, match="left out"):
        examples = NLVR2(root, skip="missing").examples("dev")
    with pytest.raises(BrokenImageError, match="dev-12-0-img0"):
        open_image(examples[0].images[0])
    with pytest.warns(UserWarning, match="4 of 6 examples are left out: 2 of 6 images"):
        examples = NLVR2(root, skip="broken").examples("dev")
    assert [example.id for example in examples] == ["dev-12-1-0", "dev-12-1-1"]


def test_nothing_left_and_a_wrong_setting(root):
    shutil.rmtree(root / "dev")
    with pytest.raises(ValueError, match="no example is left"):
        NLVR2(root, skip="missing").examples("dev")
    with pytest.raises(ValueError, match="skip is 'all'; it is one of none, missing, broken"):
        NLVR2(root, skip="all").examples("dev")


# --- metric ---


def test_metric():
    task = NLVR2(FIXTURE)
    examples = task.examples("dev")
    assert task.metric(truth(examples), examples)["consistency"] == 100
    metric = task.metric(truth(examples) | {"dev-12-1-0": "True"}, examples)
    assert metric["accuracy"] == round(100 * 5 / 6, 2)
    assert metric["consistency"] == 75  # of the sentences 12-0, 12-1, 7-0, 7-1
    assert metric["accuracy_low"] == 75  # always drawing the set with four examples and a wrong one


@given(st.data())
def test_consistency_is_the_official_scripts(data):
    part = st.integers(0, 2)
    names = data.draw(
        st.lists(st.tuples(part, part, st.integers(0, 1)), min_size=1, max_size=20, unique=True)
    )
    lines = [
        {
            "identifier": "-".join(map(str, ("dev", *name))),
            "label": data.draw(st.sampled_from(["True", "False"])),
        }
        for name in names
    ]
    predictions = {
        line["identifier"]: data.draw(st.sampled_from(["True", "False"])) for line in lines
    }
    task = NLVR2(FIXTURE)
    examples = [task.example(task._parse(line | {"sentence": "s"}), ()) for line in lines]
    accuracy, consistency = official(lines, predictions)
    metric = task.metric(predictions, examples)
    assert (metric["accuracy"], metric["consistency"]) == (
        round(100 * accuracy, 2),
        round(100 * consistency, 2),
    )


# --- predictions, batches ---


def test_prediction_file(tmp_path):
    task = NLVR2(FIXTURE)
    examples = task.examples("dev")
    path = tmp_path / "predictions.csv"
    task.write_predictions(path, dict(reversed(truth(examples).items())), examples)
    assert path.read_text().splitlines()[:2] == ["dev-12-0-0,True", "dev-12-1-0,False"]
    read = dict(line.split(",") for line in path.read_text().splitlines())
    assert official(
        [json.loads(line) for line in (FIXTURE / "dev.json").read_text().splitlines()], read
    ) == (1, 1)


def test_bad_predictions(tmp_path):
    task = NLVR2(FIXTURE)
    examples = task.examples("dev")
    for change, message in (
        ({"dev-12-0-0": "true"}, r"1 of 6 predictions \(dev-12-0-0\) are none of False, True"),
        ({"dev-1-1-1": "True"}, r"1 of 7 predictions \(dev-1-1-1\) are for no example"),
    ):
        with pytest.raises(ValueError, match=message):
            task.write_predictions(tmp_path / "p.csv", truth(examples) | change, examples)
    assert not list(tmp_path.iterdir())


def test_batch():
    task = NLVR2(FIXTURE)
    examples = list(task.examples("dev"))
    text = TextTransform(train_tokenizer([example.text for example in examples], 60))
    batch = Collator(task, text, Square(32))(examples)
    assert batch["pixel_values"].shape == (6, 2, 3, 32, 32)
    assert batch["labels"].tolist() == [1, 0, 0, 1, 1, 1]
    assert "texts_per_image" not in batch
    assert task.decode(torch.tensor([[0.0, 1.0], [2.0, 1.0]])) == ["True", "False"]
    assert isinstance(examples[0], Example)
