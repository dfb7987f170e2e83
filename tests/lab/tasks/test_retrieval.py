"""Retrieval: Karpathy's files, drawing negatives, the pool, recalls both ways."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pumer.lab import tasks
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.tasks import Collator, Retrieval
from pumer.lab.tasks.retrieval import _Captions, _Photo, recalls, recalls_in_folds

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
FLICKR, COCO = FIXTURES / "flickr30k", FIXTURES / "coco"
RAGGED = st.lists(st.integers(1, 4), min_size=1, max_size=6)  # captions of each image


@pytest.fixture
def root(tmp_path):
    """A copy of COCO's fixture to change."""
    return shutil.copytree(COCO, tmp_path / "coco")


def edit(root, change, name="dataset_coco.json"):
    content = json.loads((root / name).read_text())
    content = change(content) or content
    (root / name).write_text(json.dumps(content))


# --- reading ---


def test_examples_are_images_with_a_caption_and_negatives():
    task = tasks.build({"name": "retrieval", "root": FLICKR, "dataset": "flickr30k"})
    examples = task.examples("train")
    assert [example.id for example in examples] == [0, 1, 3, 5]
    assert [example.images[0].name for example in examples] == [
        "2001.jpg",
        "2002.jpg",
        "2004.jpg",
        "2006.jpg",
    ]
    rows = json.loads((FLICKR / "dataset_flickr30k.json").read_text())["images"]
    for example in examples:
        own = {sentence["raw"] for sentence in rows[example.id]["sentences"]}
        others = {
            s["raw"]
            for row in rows
            if row["split"] == "train" and row["imgid"] != example.id
            for s in row["sentences"]
        }
        assert example.text in own
        assert set(example.negatives) == others  # of fifteen all
        assert len(example.negatives) == 15
        assert example.target == 0


def test_draws_are_the_same_in_every_epoch_and_others_for_another_seed():
    task = Retrieval(FLICKR, negatives=5)
    first = [(example.text, example.negatives) for example in task.examples("train")]
    again = [
        (example.text, example.negatives)
        for example in Retrieval(FLICKR, negatives=5).examples("train")
    ]
    other = [
        (example.text, example.negatives)
        for example in Retrieval(FLICKR, negatives=5, seed=1).examples("train")
    ]
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_train_has_restval_unless_told_otherwise():
    assert [example.id for example in Retrieval(COCO, dataset="coco").examples("train")] == [
        4,
        5,
        6,
        7,
    ]
    alone = Retrieval(COCO, dataset="coco", restval=False, negatives=5)
    assert [example.id for example in alone.examples("train")] == [5, 6, 7]
    assert len(alone.pool("restval").images) == 1
    assert Retrieval(COCO, dataset="coco").published["train"] == {"images": 113_287}
    assert alone.published["train"] == {"images": 82_783}


def test_pool_with_six_and_seven_captions():
    pool = Retrieval(COCO, dataset="coco").pool("test")
    assert pool.image_ids == [0, 1, 2]
    assert pool.image_of.tolist() == [0] * 5 + [1] * 6 + [2] * 7
    assert pool.image_of.dtype == np.int64
    assert pool.caption_ids == list(range(18))
    assert pool.captions[5] == "Two blue balls."
    assert [path.name[-6:] for path in pool.images] == ["09.jpg", "12.jpg", "15.jpg"]
    assert pool.images[1:][0] == pool.images[1]


def test_skipped_images_leave_the_pool(root):
    (root / "val2014" / "COCO_val2014_000000000012.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 3 images \(COCO_val2014_000000000012\) are not in .*train2014"
    ):
        Retrieval(root, dataset="coco").pool("test")
    with pytest.warns(UserWarning, match="1 of 3 examples are left out"):
        pool = Retrieval(root, dataset="coco", skip="missing").pool("test")
    assert pool.image_ids == [0, 2]
    assert pool.image_of.tolist() == [0] * 5 + [1] * 7
    assert pool.caption_ids == [*range(5), *range(11, 18)]


def change_image(number, **change):
    return lambda content: content["images"][number].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_image(1, split="dev"),
            r"dataset_coco\.json: image 1: split 'dev' is none of train, restval, val, test",
        ),
        (change_image(1, filename=None), "image 1: filename is None, not a text"),
        (change_image(1, imgid=0), "image 1: id 0 repeats|image 1: sentence 5 is about image 1"),
        (change_image(1, imgid="1"), "image 1: imgid is '1', not a number"),
        (change_image(1, sentences=[]), "image 1: there are no sentences"),
        (
            lambda content: content["images"][1]["sentences"][0].pop("raw") and None,
            "image 1: there is no raw",
        ),
        (
            lambda content: content["images"][1]["sentences"][0].update(imgid=7),
            "image 1: sentence 5 is about image 7",
        ),
        (
            lambda content: content["images"][1]["sentences"][0].update(sentid=0),
            "images 0 and 1 both have sentid 0",
        ),
        (
            lambda content: content["images"].append(content["images"][0]),
            r"image 8: id 0 repeats that of .*: image 0",
        ),
        (lambda content: content.update(dataset="flickr8k"), "is of 'flickr8k', not coco"),
        (lambda content: content.pop("images") and None, "has no list of images"),
        (lambda content: [content], "has no list of images"),
        (
            lambda content: content.update(images=content["images"][3:]),
            "has no image of the split test",
        ),
    ],
)
def test_bad_files(root, change, message):
    edit(root, change)
    with pytest.raises(ValueError, match=message):
        Retrieval(root, dataset="coco").pool("test")


def test_missing_and_broken_file(root):
    with pytest.raises(
        ValueError, match=r"dataset_flickr30k\.json does not exist.*caption_datasets"
    ):
        Retrieval(root).examples("train")
    (root / "dataset_coco.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"dataset_coco\.json is no JSON"):
        Retrieval(root, dataset="coco").examples("train")


def test_wrong_settings():
    with pytest.raises(ValueError, match="dataset is 'mscoco'; it is one of flickr30k, coco"):
        Retrieval(COCO, dataset="mscoco")
    with pytest.raises(ValueError, match="negatives is -1"):
        Retrieval(COCO, negatives=-1)
    with pytest.raises(
        ValueError, match="flickr30k has the splits train, val, test, not 'restval'"
    ):
        Retrieval(FLICKR).examples("restval")
    with pytest.raises(
        ValueError, match="val has 5 captions of images other than 4; set negatives to as many"
    ):
        Retrieval(FLICKR).examples("val")


@given(RAGGED, st.integers(0, 8), st.integers(0, 3))
def test_drawn_captions_are_the_images_own_and_others(counts, negatives, seed):
    ends = np.cumsum(counts).tolist()
    photos = [
        _Photo(i, str(i), "train", tuple((n, str(n)) for n in range(end - count, end)))
        for i, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]
    captions = _Captions(photos)
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    assert captions.image_of.tolist() == owner
    for image, count in enumerate(counts):
        negatives = min(negatives, len(owner) - count)
        text, others = captions.draw(image, negatives, seed)
        assert owner[int(text)] == image
        assert len(set(others)) == len(others) == negatives
        assert image not in {owner[int(other)] for other in others}


# --- recalls ---


def slow_recalls(scores, image_of, ks):
    """Sort every row and every column and look."""
    found = {}
    for k in ks:
        if k <= len(image_of):
            hits = [
                any(
                    image_of[t] == image
                    for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:k]
                )
                for image, row in enumerate(scores)
            ]
            found[f"tr_r{k}"] = round(100 * sum(hits) / len(hits), 2)
        if k <= len(scores):
            columns = list(zip(*scores, strict=True))
            hits = [
                image in sorted(range(len(column)), key=lambda i: (-column[i], i))[:k]
                for image, column in zip(image_of, columns, strict=True)
            ]
            found[f"ir_r{k}"] = round(100 * sum(hits) / len(hits), 2)
    return found


@given(RAGGED, st.data())
def test_recalls_are_those_of_the_slow_loop(counts, data):
    image_of = data.draw(
        st.permutations([i for i, count in enumerate(counts) for _ in range(count)])
    )
    row = st.lists(
        st.integers(0, 4), min_size=len(image_of), max_size=len(image_of)
    )  # few values: many ties
    scores = data.draw(st.lists(row, min_size=len(counts), max_size=len(counts)))
    expected = slow_recalls(scores, image_of, (1, 2, 3))
    for kind in (np.array(scores), torch.tensor(scores, dtype=torch.bfloat16)):
        found = recalls(kind, np.array(image_of), (1, 2, 3))
        assert {name: value for name, value in found.items() if name.count("_") == 1} == expected
        for name in expected:
            assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 100


def test_folds_are_ranked_on_their_own():
    image_of = np.repeat(np.arange(6), [5, 6, 7, 5, 5, 6])
    scores = np.random.default_rng(0).standard_normal((6, len(image_of)))
    parts = [
        recalls(
            scores[s : s + 3][:, image_of // 3 == s // 3], image_of[image_of // 3 == s // 3] - s
        )
        for s in (0, 3)
    ]
    expected = {
        name: round((parts[0][name] + parts[1][name]) / 2, 2)
        for name in parts[0]
        if name.count("_") == 1
    }
    assert recalls_in_folds(scores, image_of, 2) == expected
    order = np.random.default_rng(1).permutation(len(image_of))  # captions may come in any order
    assert recalls_in_folds(torch.tensor(scores[:, order]), image_of[order], 2) == expected
    for folds in (0, 4, 7):
        with pytest.raises(ValueError, match=f"6 images do not make {folds} equal folds"):
            recalls_in_folds(scores, image_of, folds)


def test_perfect_and_worst_scores():
    image_of = np.repeat(np.arange(4), [5, 6, 7, 5])
    perfect = (image_of == np.arange(4)[:, None]).astype(np.float32)
    found = recalls(perfect, image_of)
    assert set(found.values()) == {100}
    assert "ir_r5" not in found  # there are four images
    assert "tr_r10" in found
    worst = recalls(-perfect, image_of, (1, 3))
    assert set(worst.values()) == {0}


def test_captions_of_an_image_are_drawn_together():
    image_of = np.repeat(np.arange(20), 5)
    scores = np.zeros((20, 100))
    scores[np.arange(10).repeat(5), np.arange(50)] = 1  # all captions of half the images are found
    scores[0, 50:] = 1
    found = recalls(scores, image_of, (1,))
    assert found["ir_r1"] == 50
    assert found["ir_r1_high"] - found["ir_r1_low"] > 1.5 * 2 * 1.96 * 100 * 0.5 / 100**0.5


@pytest.mark.parametrize(
    ("image_of", "message"),
    [
        ([0, 0, 1], "scores are for 2 images and 4 captions"),
        ([0, 0, 0, 0], "each image must have one"),
        ([0, 1, 2, 1], "must give one of those"),
        ([-1, 0, 1, 1], "must give one of those"),
    ],
)
def test_recalls_of_what_does_not_fit(image_of, message):
    with pytest.raises(ValueError, match=message):
        recalls(np.zeros((2, 4)), np.array(image_of))


def test_recalls_without_numbers():
    with pytest.raises(ValueError, match="some scores are NaN"):
        recalls(np.full((1, 2), np.nan), np.zeros(2, dtype=int))


def test_recalls_are_the_published_ones(shared):
    data = load_file(shared / "parity" / "training.safetensors")
    published = json.loads((shared / "parity" / "training.json").read_text())["retrieval_metrics"]
    place = {number: i for i, number in enumerate(data["retrieval_image_ids"].tolist())}
    image_of = np.array([place[number] for number in data["retrieval_text_image_ids"].tolist()])
    found = recalls(data["retrieval_scores"], image_of)
    for name, value in published.items():
        # PuMer selects models by "metric", which is R@1 of image retrieval.
        assert found[{"metric": "ir_r1"}.get(name, name)] == pytest.approx(
            100 * value, abs=0.005
        ), name


# --- predictions, batches ---


def test_batch_has_each_image_once():
    task = Retrieval(FLICKR, negatives=3)
    examples = list(task.examples("train"))
    text = TextTransform(train_tokenizer([example.text for example in examples], 60))
    batch = Collator(task, text, Square(32))(examples)
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["input_ids"].shape[0] == batch["attention_mask"].shape[0] == 16
    assert batch["texts_per_image"] == 4
    assert batch["labels"].tolist() == [0, 0, 0, 0]
    assert batch["labels"].dtype == torch.int64
    alone = text([examples[1].text], [1])["input_ids"][0]
    assert batch["input_ids"][4, : len(alone)].tolist() == alone.tolist()
    alone = text([examples[2].negatives[0]], [2])["input_ids"][0]
    assert batch["input_ids"][9, : len(alone)].tolist() == alone.tolist()


def test_batch_without_negatives():
    task = Retrieval(FLICKR, negatives=0)
    examples = list(task.examples("val"))
    batch = Collator(task, TextTransform(train_tokenizer([examples[0].text], 60)), Square(32))(
        examples
    )
    assert batch["input_ids"].shape[0] == 2
    assert "texts_per_image" not in batch


def test_ranking_a_few_captions(tmp_path):
    task = Retrieval(FLICKR, negatives=2)
    examples = task.examples("train")
    logits = torch.tensor([[3.0, 1, 2], [0, 1, 2], [1, 0, 0], [5, 4, 4]])
    predictions = dict(zip((example.id for example in examples), task.decode(logits), strict=True))
    assert predictions == {0: 0, 1: 2, 3: 0, 5: 0}
    assert task.metric(predictions, examples)["accuracy"] == 75
    task.write_predictions(tmp_path / "p.jsonl", predictions, examples)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows[0] == {"imgid": 0, "caption": examples[0].text}
    assert rows[1] == {"imgid": 1, "caption": examples[1].negatives[1]}
