"""Generated data sets in official files: read by the official tasks, they are what the generators
made."""

import json

import numpy as np
import pytest
from PIL import Image

from pumer.lab import tasks
from pumer.lab.data.images import open_image
from pumer.lab.scenes import set_files as scene_set_files
from pumer.lab.scenes.captions import describe
from pumer.lab.scenes.drawing import draw_scenes
from pumer.lab.scenes.hypotheses import LABELS, suppose
from pumer.lab.scenes.set_files import write_karpathy, write_nlvr2, write_snli_ve
from pumer.lab.scenes.sets import draw_sets
from pumer.lab.scenes.statements import PAIRS, state
from pumer.lab.scenes.views import dice_of, views


def pixels(image):
    return np.asarray(open_image(image)).transpose(2, 0, 1)


def test_nlvr2(tmp_path):
    out = write_nlvr2(tmp_path / "new", 4, {"train": 9, "dev": 4, "test1": 4}, image_size=32)
    task = tasks.build({"name": "nlvr2", "root": str(out)})
    scenes, sets = draw_sets(4, range(5), 4, state, image_size=32)
    for split, numbers in {"train": (0, 1, 2), "dev": (3,), "test1": (4,)}.items():
        examples = task.examples(split)
        assert len(examples) == 4 * len(numbers)
        for place in range(len(examples)):
            example, (number, pair) = examples[place], (numbers[place // 4], place % 4)
            made = sets[number]
            assert example.id == f"{split}-{number}-{pair}-0"
            assert (example.text, example.target) == (made.said.sentence, made.said.labels[pair])
            for image, picture in zip(example.images, PAIRS[pair], strict=True):
                assert (pixels(image) == scenes.images[made.rows[picture]].numpy()).all()
    metric = task.metric(
        {e.id: task.labels[e.target] for e in task.examples("dev")}, task.examples("dev")
    )
    assert (metric["accuracy"], metric["consistency"]) == (100, 100)
    line = json.loads((out / "train.json").read_text().splitlines()[0])
    assert (out / "images" / "train" / str(line["directory"]) / "train-0-0-img0.png").is_file()


def test_snli_ve(tmp_path):
    out = write_snli_ve(tmp_path, 4, {"train": 7, "test": 3}, image_size=32)
    task = tasks.build({"name": "snli-ve", "root": str(out)})
    scenes, sets = draw_sets(4, range(4), 3, suppose, image_size=32)
    seen = views(scenes)
    for split, first, count in (("train", 0, 27), ("test", 3, 9)):
        lines = [
            json.loads(line) for line in (out / f"snli_ve_{split}.jsonl").read_text().splitlines()
        ]
        examples = task.examples(split)
        assert len(examples) == len(lines) == count
        for place, line in enumerate(lines):
            made, example = sets[first + place // 9], examples[place]
            picture, hypothesis = place % 9 // 3, made.said[place % 3]
            assert (example.text, example.target) == (
                hypothesis.sentence,
                hypothesis.labels[picture],
            )
            assert (pixels(example.images[0]) == scenes.images[made.rows[picture]].numpy()).all()
            number = 3 * first + place // 3
            assert (
                line["sentence1"]
                == describe(seen[made.rows[picture]], dice_of(4, number), 1)[0].text
            )
            assert line["pairID"] == example.id == f"{number}.jpg#0r1{LABELS[example.target][0]}"
            assert list(line) == sorted(line)


@pytest.mark.parametrize(
    ("dataset", "splits"),
    [
        ("flickr30k", {"train": 4, "val": 3, "test": 18}),
        ("coco", {"train": 4, "restval": 2, "val": 3, "test": 18}),
    ],
)
def test_karpathy(tmp_path, dataset, splits):
    out = write_karpathy(tmp_path, 4, splits, dataset, image_size=32)
    task = tasks.build(
        {
            "name": "retrieval",
            "root": str(out),
            "dataset": dataset,
            "restval": False,
            "negatives": 3,
        }
    )
    scenes = draw_scenes(4, range(sum(splits.values())), image_size=32)
    seen = views(scenes)
    first = 0
    for split, count in splits.items():
        pool = task.pool(split)
        assert list(pool.image_ids) == list(range(first, first + count))
        for place in range(count):
            assert (pixels(pool.images[place]) == scenes.images[first + place].numpy()).all()
        captions = [
            [
                caption.text
                for caption in describe(
                    seen[n], dice_of(4, n), 6 if dataset == "coco" and n % 16 == 0 else 5
                )
            ]
            for n in range(first, first + count)
        ]
        assert list(pool.captions) == [text for own in captions for text in own]
        assert pool.image_of.tolist() == [i for i, own in enumerate(captions) for _ in own]
        assert len(task.examples(split)) == count
        first += count
    ids = [
        sentence["sentid"]
        for image in json.loads(task.file.read_text())["images"]
        for sentence in image["sentences"]
    ]
    assert ids == list(range(len(ids)))


@pytest.mark.parametrize("write", [write_nlvr2, write_snli_ve, write_karpathy])
def test_wrong_splits_write_nothing(tmp_path, write):
    for splits in ({"nowhere": 3}, {"train": 0}, {}):
        with pytest.raises(ValueError, match=r"do not fit; .* has train"):
            write(tmp_path / "new", 4, splits)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="not an empty folder"):
        write(tmp_path, 4, {"train": 1})


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scene_set_files, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write_nlvr2(tmp_path / "new", 4, {"dev": 4})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("nlvr2", "test2.json"),
        ("snli-ve", "snli_ve_dev.jsonl"),
        ("retrieval", "dataset_flickr30k.json"),
    ],
)
def test_command_writes_all_splits(tmp_path, task, file):
    from pumer.lab.commands.data import scenes

    scenes(str(tmp_path / "new"), task=task, pictures=5, image_size=32)
    assert (tmp_path / "new" / file).is_file()
    assert Image.open(next((tmp_path / "new").rglob("*.png"))).size == (32, 32)
