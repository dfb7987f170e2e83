"""`pumer data check`: counts against the published ones, what is missing, what cannot be
decoded."""

import re
import shutil
from pathlib import Path

import pytest

from pumer.cli import main
from pumer.lab.tasks.check import check_files

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"


@pytest.fixture
def root(tmp_path):
    """Copies of the fixtures to change."""
    return shutil.copytree(FIXTURES, tmp_path / "fixtures")


@pytest.mark.parametrize(
    ("name", "folder", "complete", "counts"),
    [
        ("vqav2", "vqav2", ["val2014"], {"questions": 8, "images": 3}),
        ("nlvr2", "nlvr2", ["train", "dev"], {"examples": 8, "images": 8}),
        ("snli-ve", "snli-ve", ["train", "dev", "test"], {"examples": 8, "images": 4}),
        (
            "retrieval",
            "flickr30k",
            ["flickr30k train", "flickr30k val", "flickr30k test"],
            {"images": 8, "captions": 40},
        ),
        (
            "retrieval",
            "coco",
            ["coco train", "coco restval", "coco val", "coco test"],
            {"images": 8, "captions": 44},
        ),
    ],
)
def test_fixtures_have_eight_samples(name, folder, complete, counts):
    checks = check_files(name, FIXTURES / folder, decode=True)
    assert [check.name for check in checks if check.complete] == complete
    assert all(check.absent for check in checks if not check.complete)
    for thing, count in counts.items():
        assert sum(check.counts.get(thing, 0) for check in checks) == count


def test_published_counts():
    published = {check.name: check.published for check in check_files("vqav2", FIXTURES / "vqav2")}
    assert published["val2014"] == {"questions": 214354, "images": 40504}
    published = {
        check.name: check.published for check in check_files("retrieval", FIXTURES)
    }  # neither file is there
    assert published["coco train"] == {"images": 82783}
    assert published["coco test"] == {"images": 5000, "captions": 25010}
    assert published["flickr30k test"] == {"images": 1000, "captions": 5000}


def test_missing_and_broken_images(root):
    photos = root / "snli-ve" / "flickr30k_images"
    (photos / "1002.jpg").unlink()
    (photos / "1003.jpg").write_bytes(b"no image")
    train, dev, test = check_files("snli-ve", root / "snli-ve")
    assert (dev.missing, dev.broken, dev.complete) == (["1002"], {}, False)
    assert train.complete
    assert test.complete
    dev = check_files("snli-ve", root / "snli-ve", decode=True)[1]
    assert dev.missing == ["1002"]
    assert list(dev.broken) == ["1003"]


def ends(words, code):
    """Run the command to its end with this code."""
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["data", "check", *words]))
    assert caught.value.code == code


def test_table_and_list(root, capsys, tmp_path):
    photos = root / "snli-ve" / "flickr30k_images"
    (photos / "1002.jpg").unlink()
    (photos / "1003.jpg").write_bytes(b"no image")
    path = tmp_path / "missing.txt"
    folder = str(root / "snli-ve")
    ends(["snli-ve", folder, "--decode", "true", "--missing", str(path)], 1)
    printed = capsys.readouterr().out
    for text in (
        "3 examples",
        "529,527",
        "29,783",
        "dev: 1 of 2 images (1002) are not in",
        "1003.jpg cannot be read",
    ):
        assert text in printed
    assert path.read_text().split() == ["1002", "1003"]


def test_images_elsewhere(root, capsys):
    photos = (root / "snli-ve" / "flickr30k_images").rename(root / "photos")
    ends(["snli-ve", str(root / "snli-ve")], 1)
    assert "images of train, dev, test are missing or broken" in capsys.readouterr().err
    assert main(["data", "check", "snli-ve", str(root / "snli-ve"), "--images", str(photos)]) == 0
    assert main(["data", "check", "snli-ve", str(root / "snli-ve"), "--images", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_broken_file_fails(root, capsys):
    with (root / "nlvr2" / "dev.json").open("a") as file:
        file.write("nonsense\n")
    ends(["nlvr2", str(root / "nlvr2")], 1)
    printed = capsys.readouterr()
    assert "dev.json:7: no JSON" in printed.out
    assert "the files of dev cannot be read" in printed.err


def test_splits_of_other_names(root, capsys):
    folder = root / "vqav2"
    for path in folder.glob("*.json"):
        shutil.copy(path, path.with_name(path.name.replace("val2014", "mine")))
    shutil.copytree(folder / "val2014", folder / "mine")
    for path in (folder / "mine").iterdir():
        path.rename(path.with_name(path.name.replace("val2014", "mine")))
    names = [check.name for check in check_files("vqav2", folder)]
    assert names == ["train2014", "val2014", "test2015", "test-dev2015", "mine"]
    for path in folder.glob("*val2014*.json"):
        path.unlink()
    (check,) = check_files("vqav2", folder)  # what of VQAv2 itself is not there is no news now
    assert check.complete
    assert (check.name, check.counts) == ("mine", {"questions": 8, "images": 3})
    assert main(["data", "check", "vqav2", str(folder)]) == 0
    (folder / "v2_mscoco_mine_annotations.json").unlink()
    ends(["vqav2", str(folder)], 1)
    assert "the files of mine cannot be read" in capsys.readouterr().err


def test_other_splits_of_snli_ve(root):
    for path in (root / "snli-ve").glob("*.jsonl"):
        path.rename(path.with_name(path.name.replace("snli_ve_", "snli_ve_my_")))
    names = [check.name for check in check_files("snli-ve", root / "snli-ve") if check.complete]
    assert names == ["my_dev", "my_test", "my_train"]


def test_a_split_without_its_annotations_is_not_absent(root, capsys):
    (root / "vqav2" / "v2_mscoco_val2014_annotations.json").unlink()
    ends(["vqav2", str(root / "vqav2")], 1)
    assert "the files of val2014 cannot be read" in capsys.readouterr().err


def test_nothing_there(capsys):
    ends(["nlvr2", str(FIXTURES)], 1)
    assert "no split of nlvr2 is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nlvr2", str(FIXTURES / "nowhere")], "nowhere is no folder"),
        (
            ["scenes", str(FIXTURES)],
            "scenes is not read from official files; there are nlvr2, retrieval, snli-ve, vqav2",
        ),
        (["nlvr3", str(FIXTURES)], "no task is named 'nlvr3'"),
    ],
)
def test_what_cannot_be_checked(capsys, words, message):
    assert main(["data", "check", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
