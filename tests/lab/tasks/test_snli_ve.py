"""SNLI-VE: reading the official files, accuracy, the prediction file."""

import json
import shutil
from pathlib import Path

import pytest

from pumer.lab import tasks
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.tasks import SNLIVE, Collator

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "snli-ve"
DEV = {"1002.jpg#1r1e": "entailment", "1002.jpg#1r1c": "contradiction", "1003.jpg#2r1n": "neutral"}


@pytest.fixture
def root(tmp_path):
    """A copy of the fixture to change."""
    return shutil.copytree(FIXTURE, tmp_path / "snli-ve")


def edit(path, line, **change):
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | change)
    path.write_text("\n".join(lines) + "\n")


def test_reads_the_files():
    task = tasks.build({"name": "snli-ve", "root": FIXTURE})
    examples = task.examples("dev")
    assert [example.id for example in examples] == list(DEV)
    assert [task.labels[example.target] for example in examples] == list(DEV.values())
    assert [example.target for example in examples] == [2, 0, 1]  # PuMer's and METER's numbers
    assert examples[2].text == "The boxes are heavy."  # the hypothesis, not the caption
    assert examples[2].images[0].name == "1003.jpg"
    assert [example.cluster for example in examples] == ["1002", "1002", "1003"]
    assert [len(task.examples(split)) for split in ("train", "dev", "test")] == [3, 3, 2]


def test_images_lie_directly_in_a_folder(root, tmp_path):
    folder = (root / "flickr30k_images").rename(tmp_path / "photos")
    assert SNLIVE(root, images=folder).examples("test")[0].images[0].parent == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gold_label": "+"},
            r"1 of 3 rows are broken.*dev\.jsonl:2: label '\+' is none of contradiction, neutral, "
            r"ent",
        ),
        ({"gold_label": 1}, r"dev\.jsonl:2: gold_label is 1, not a text"),
        ({"gold_label": None}, r"1 of 3 rows \(1002\.jpg#1r1c\) have no label"),
        ({"sentence2": None}, r"dev\.jsonl:2: sentence2 is None, not a text"),
        (
            {"pairID": "1002.jpg#1r1e"},
            r"dev\.jsonl:2: id 1002\.jpg#1r1e repeats that of .*dev\.jsonl:1",
        ),
        ({"Flickr30K_ID": 1002}, r"dev\.jsonl:2: Flickr30K_ID is 1002, not a text"),
        ({"Flickr30K_ID": "9"}, r"1 of 3 images \(9\) are not in .*flickr30k_images"),
    ],
)
def test_bad_lines(root, change, message):
    edit(root / "snli_ve_dev.jsonl", 2, **change)
    with pytest.raises(ValueError, match=message):
        SNLIVE(root).examples("dev")


def test_rows_without_agreement_are_left_out_and_counted(root):
    edit(root / "snli_ve_dev.jsonl", 2, gold_label="-")
    with pytest.warns(UserWarning, match=r"1 of 3 rows of .*dev\.jsonl are labelled '-'"):
        examples = SNLIVE(root).examples("dev")
    assert [example.id for example in examples] == [name for name in DEV if name != "1002.jpg#1r1c"]
    for line in (1, 3):
        edit(root / "snli_ve_dev.jsonl", line, gold_label="-")
    with pytest.raises(ValueError, match="has no row to use: 3 are labelled '-'"):
        SNLIVE(root).examples("dev")


def test_a_file_without_labels_is_predicted_and_not_scored(root, tmp_path):
    path = root / "snli_ve_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["gold_label"]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = SNLIVE(root)
    examples = task.examples("test")
    assert [example.target for example in examples] == [None, None]
    predictions = {example.id: "neutral" for example in examples}
    task.write_predictions(tmp_path / "p.jsonl", predictions, examples)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="has no label; score a labelled split"):
        task.metric(predictions, examples)


def test_missing_file(root):
    (root / "snli_ve_test.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"snli_ve_test\.jsonl does not exist; .* has snli_ve_dev\.jsonl"
    ):
        SNLIVE(root).examples("test")


def test_skipping_counts_what_is_left_out(root):
    (root / "flickr30k_images" / "1002.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"2 of 3 examples are left out: 1 of 2 images \(1002\)"):
        assert len(SNLIVE(root, skip="broken").examples("dev")) == 1


def test_metric():
    task = SNLIVE(FIXTURE)
    examples = task.examples("dev")
    metric = task.metric(DEV | {"1003.jpg#2r1n": "entailment"}, examples)
    assert metric["accuracy"] == round(100 * 2 / 3, 2)
    assert (metric["accuracy_low"], metric["accuracy_high"]) == (
        0,
        100,
    )  # one picture all wrong, one all right
    assert {name: metric[name] for name in metric if name.startswith("label:")} == {
        "label:contradiction": 100,
        "label:neutral": 0,
        "label:entailment": 100,
    }


def test_prediction_file(tmp_path):
    task = SNLIVE(FIXTURE)
    examples = task.examples("dev")
    task.write_predictions(tmp_path / "p.jsonl", dict(reversed(DEV.items())), examples)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows == [{"pairID": name, "prediction": label} for name, label in DEV.items()]
    with pytest.raises(ValueError, match=r"1 of 3 predictions .* are none of contradiction"):
        task.write_predictions(tmp_path / "q.jsonl", DEV | {"1003.jpg#2r1n": 1}, examples)
    with pytest.raises(ValueError, match=r"1 of 3 examples .* have no prediction"):
        task.write_predictions(tmp_path / "q.jsonl", dict(list(DEV.items())[:2]), examples)


def test_batch():
    task = SNLIVE(FIXTURE)
    examples = list(task.examples("train"))
    text = TextTransform(train_tokenizer([example.text for example in examples], 60))
    batch = Collator(task, text, Square(32))(examples)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["labels"].tolist() == [1, 0, 2]
