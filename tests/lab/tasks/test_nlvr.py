"""NLVR v1: reading, cutting off validation, accuracy and consistency, the prediction file."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pumer.lab.data.images import KeepAspect, open_image
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.tasks import NLVR, Collator

DATA = Path(__file__).parents[2] / "data"
ROWS = pq.read_table(DATA / "nlvr8.parquet").to_pylist()
DEV, TRAIN = ROWS[:4], ROWS[4:]
ALL_ORDERS = [row | {"k": k, "id": f"dev-{row['example_id']}-{k}"} for row in DEV for k in range(6)]
DIRECTORIES = sorted({row["directory"] for row in TRAIN})


def write(folder, name, rows):
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pq.read_schema(DATA / "nlvr8.parquet")),
        folder / f"{name}.parquet",
    )


@pytest.fixture
def task(tmp_path):
    """A task with a train file of two directories and one dev presentation, once and in all box
    orders."""
    write(tmp_path, "train_all6", TRAIN)
    write(tmp_path, "dev_k0", DEV)
    write(tmp_path, "dev_all6", ALL_ORDERS)
    return NLVR(tmp_path, held_out=DIRECTORIES[:1])


def truth(examples):
    return {example.id: ("false", "true")[example.target] for example in examples}


def test_reads_the_rows():
    examples = NLVR(DATA).examples("nlvr8")
    assert [example.id for example in examples] == [row["id"] for row in ROWS]
    assert [example.target for example in examples] == [1, 1, 0, 0, 1, 0, 0, 1]
    assert examples[0].text == "There is a box with a blue circle and a blue triangle."
    assert examples[3].cluster == 1021
    assert open_image(examples[0].images[0]).size == (400, 100)


def test_validation_is_cut_by_directory(task):
    train, validation = task.examples("train"), task.examples("validation")
    assert {example.meta["directory"] for example in validation} == set(DIRECTORIES[:1])
    assert {example.meta["directory"] for example in train} == set(DIRECTORIES[1:])
    assert len(train) + len(validation) == len(TRAIN)


def test_another_train_file(task, tmp_path):
    write(tmp_path, "train_full_k0", TRAIN[:2])
    full = NLVR(tmp_path, train_file="train_full_k0.parquet", held_out=())
    assert len(full.examples("train")) == 2
    assert len(full.examples("validation")) == 0


def test_accuracy_without_all_orders_has_no_consistency(task):
    examples = task.examples("dev_k0")
    predictions = truth(examples) | {"dev-1021-0-0": "false"}
    assert task.metric(predictions, examples) == {
        "accuracy": 75,
        "accuracy_low": 75,
        "accuracy_high": 75,
    }


def test_consistency_needs_every_order_of_a_presentation(tmp_path):
    other = [row | {"presentation": 7, "example_id": f"7-{row['position']}"} for row in ALL_ORDERS]
    write(
        tmp_path,
        "dev_all6",
        ALL_ORDERS + [row | {"id": f"dev-{row['example_id']}-{row['k']}"} for row in other],
    )
    task = NLVR(tmp_path)
    examples = task.examples("dev_all6")
    right = truth(examples)
    assert task.metric(right, examples)["consistency"] == 100
    metric = task.metric(right | {"dev-7-2-5": "true"}, examples)
    assert metric["accuracy"] == round(100 * 47 / 48, 2)
    assert metric["consistency"] == 50
    assert (metric["accuracy_low"], metric["accuracy_high"]) == (round(100 * 23 / 24, 2), 100)


def test_prediction_file_as_the_official_script_reads_it(task, tmp_path):
    examples = task.examples("dev_all6")
    path = tmp_path / "predictions.csv"
    task.write_predictions(path, truth(examples) | {"dev-1021-0-3": "false"}, examples)
    lines = path.read_text().splitlines()
    assert lines[:4:3] == ["dev-1021-0-0.png,true", "dev-1021-0-3.png,false"]
    # The script keys what stands between the first hyphen and the dot, and looks up
    # identifier-order.
    keys = {line.split(",")[0].split(".")[0].split("-", 1)[1] for line in lines}
    assert keys == {f"{row['example_id']}-{k}" for row in DEV for k in range(6)}


def test_bad_predictions(task, tmp_path):
    examples = task.examples("dev_k0")
    with pytest.raises(
        ValueError, match=r"1 of 4 predictions \(dev-1021-0-0\) are neither true nor false"
    ):
        task.write_predictions(
            tmp_path / "p.csv", truth(examples) | {"dev-1021-0-0": "True"}, examples
        )
    with pytest.raises(ValueError, match="4 of 4 examples"):
        task.write_predictions(tmp_path / "p.csv", {}, examples)
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "train-1-1-1"}, "1 of 2 rows repeat an id"),
        ({"sentence": None}, r"2 of 2 rows \(train-.*\) have no sentence"),
        ({"label": None}, r"2 of 2 rows \(train-.*\) have no label; attach"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    write(tmp_path, "train_all6", [row | change for row in TRAIN])
    with pytest.raises(ValueError, match=message):
        NLVR(tmp_path, held_out=DIRECTORIES[:1]).examples("train")


def test_unlabelled_rows_can_be_predicted_but_not_scored(tmp_path):
    write(tmp_path, "hidden", [row | {"label": None} for row in DEV])
    task = NLVR(tmp_path)
    examples = task.examples("hidden")
    predictions = {example.id: "true" for example in examples}
    task.write_predictions(tmp_path / "p.csv", predictions, examples)
    with pytest.raises(ValueError, match="has no label"):
        task.metric(predictions, examples)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"dev_k0\.parquet does not exist"):
        NLVR(tmp_path).examples("dev_k0")


def test_batch(task):
    examples = task.examples("dev_k0")
    text = TextTransform(train_tokenizer([example.text for example in examples], 60))
    batch = Collator(task, text, KeepAspect(64, multiple=16))(list(examples))
    assert batch["pixel_values"].shape == (4, 3, 16, 96)
    assert batch["labels"].tolist() == [1, 1, 0, 0]
    assert task.decode(torch.tensor([[0.0, 1.0], [2.0, 1.0]])) == ["true", "false"]


# --- the real files ---


@pytest.fixture(scope="module")
def real(shared):
    folder = shared / "data" / "nlvr"
    if not folder.is_dir():
        pytest.skip("no NLVR in the reference data")
    return NLVR(folder)


def test_real_dev_counts(real):
    examples = real.examples("dev_k0")
    assert len(examples) == 989
    assert sum(example.target for example in examples) == 547
    assert open_image(examples[988].images[0]).size == (400, 100)
    always = real.metric({example.id: "true" for example in examples}, examples)
    assert always["accuracy"] == 55.31
    assert always["accuracy_low"] < 54 < 57 < always["accuracy_high"]


def test_real_dev_in_all_orders(real):
    examples = real.examples("dev_all6")
    assert len(examples) == 5934
    assert len({example.meta["example_id"] for example in examples}) == 989
    assert real.metric(truth(examples), examples)["consistency"] == 100


def test_real_validation_shares_no_presentation_with_train(real):
    train, validation = real.examples("train"), real.examples("validation")
    assert len(train) + len(validation) == 6000
    assert 0.08 < len(validation) / 6000 < 0.12
    assert not {example.cluster for example in train} & {example.cluster for example in validation}


def test_real_ranking_groups_agree_with_the_labels(real):
    labels = {example.meta["example_id"]: example.target for example in real.examples("dev_k0")}
    for line in (Path(real.root) / "dev_groups.jsonl").read_text().splitlines():
        group = json.loads(line)
        assert all(labels[name] == 1 for name in group["true"])
        assert all(labels[name] == 0 for name in group["false"])
