"""Images by key: folders, LMDB and Parquet give the same bytes, to every task and in every
process."""

import io
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from pumer.lab.data.image_store import LMDB, Folder, Parquet, open_store
from pumer.lab.data.images import BrokenImageError, Upright, open_image
from pumer.lab.tasks import NLVR2, SNLIVE, Retrieval, VQAv2

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
PHOTOS = FIXTURES / "flickr30k" / "flickr30k_images"
FILES = {path.stem: path.read_bytes() for path in PHOTOS.iterdir()}
TASKS = {
    "vqav2": (VQAv2(FIXTURES / "vqav2"), "val2014"),
    "nlvr2": (NLVR2(FIXTURES / "nlvr2"), "dev"),
    "nlvr2 train": (NLVR2(FIXTURES / "nlvr2"), "train"),
    "snli-ve": (SNLIVE(FIXTURES / "snli-ve"), "dev"),
    "flickr30k": (Retrieval(FIXTURES / "flickr30k", negatives=5), "test"),
    "coco": (Retrieval(FIXTURES / "coco", dataset="coco", negatives=5), "train"),
}


def write_lmdb(path, files):
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 22) as environment,
        environment.begin(write=True) as writer,
    ):
        for key, content in files.items():
            writer.put(key.encode(), content)
    return path


def write_parquet(path, files, group=3):
    """As Hugging Face writes image data sets, in small row groups."""
    rows = [
        {"image": {"bytes": content, "path": f"some/folder/{key}.jpg"}}
        for key, content in files.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_keys(path, keys, images):
    pq.write_table(pa.table({"key": keys, "image": images}), path)
    return path


def write_parts(folder, files):
    """Several files, with a column of keys and plain bytes."""
    folder.mkdir()
    names = list(files)
    for part, some in enumerate((names[:5], names[5:])):
        write_keys(folder / f"part-{part}.parquet", some, [files[name] for name in some])
    return folder


WRITERS = {
    "images.lmdb": write_lmdb,
    "images.parquet": write_parquet,
    "parts": write_parts,
}


@pytest.fixture(params=["folder", *WRITERS])
def store(request, tmp_path):
    if request.param == "folder":
        return open_store(PHOTOS)
    return open_store(WRITERS[request.param](tmp_path / request.param, FILES))


def content(source):
    return source if isinstance(source, bytes) else source.read_bytes()


@pytest.mark.smoke
def test_every_store_gives_the_files(store):
    assert set(store.keys()) == set(FILES)
    for key, expected in reversed(FILES.items()):
        assert content(store[key]) == expected


def test_a_missing_key_names_store_and_key(store):
    with pytest.raises(
        BrokenImageError,
        match=r"(flickr30k_images|images\.lmdb|images\.parquet|parts) has no image '9'",
    ):
        store["9"]


def test_selected_images_are_read_one_by_one(store):
    images = store.select(["2003", "9", "2001"])
    assert len(images) == 3
    assert content(images[-1]) == FILES["2001"]
    assert [content(image) for image in images[::2]] == [FILES["2003"], FILES["2001"]]
    with pytest.raises(ValueError, match="no image '9'"):
        images[1]
    with pytest.raises(IndexError):
        images[3]


class Sizes(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return open_image(self.images[index]).size


def test_stores_work_in_loader_workers(store):
    """Pickled as for a spawned worker, and read here before a fork."""
    images = pickle.loads(pickle.dumps(store.select(sorted(FILES))))
    assert content(images[0]) == FILES["2001"]
    loader = torch.utils.data.DataLoader(
        Sizes(images), num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    assert [size for batch in loader for size in batch] == [(48, 32)] * len(FILES)
    assert content(images[1]) == FILES["2002"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_task_reads_every_store(tmp_path, name, kind):
    task, split = TASKS[name]
    files = {
        path.stem: path.read_bytes()
        for path in Path(task.root).rglob("*")
        if path.suffix in (".jpg", ".png")
    }
    stored = replace(task, images=WRITERS[kind](tmp_path / kind, files))
    for example, other in zip(task.examples(split), stored.examples(split), strict=True):
        assert len(example.images) == task.image_count
        assert [path.read_bytes() for path in example.images] == list(other.images)
        assert (example.id, example.text, example.target) == (other.id, other.text, other.target)


def test_two_tasks_may_share_an_lmdb_file(tmp_path):
    path = write_lmdb(tmp_path / "images.lmdb", FILES)
    one, two = open_store(path), open_store(tmp_path / "." / "images.lmdb")
    assert one["2001"] == two["2001"] == FILES["2001"]


# --- names ---


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("000000000139", "COCO_val2014_000000000139"),
        ("COCO_val2014_000000000139", "000000000139"),
        ("COCO_train2014_000000000139", "COCO_val2014_000000000139"),
        ("photo one", "photo one.jpg"),
        ("photo.one", "photo.one.webp"),
        ("000000000139", "val2017/000000000139.jpg"),
        ("some.dots", "some.dots"),
    ],
)
def test_other_names_of_an_image(tmp_path, stored, asked):
    content_of, others = FILES["2001"], {"000000000140": b"x", "photo": b"x", "some": b"x"}
    files = {**others, stored: content_of}
    stores = [open_store(write(tmp_path / name, files)) for name, write in WRITERS.items()]
    (tmp_path / "folder").mkdir()
    for key, data in files.items():
        (tmp_path / "folder" / f"{key}.jpg").write_bytes(data)
    for store in (*stores, open_store(tmp_path / "folder")):
        assert content(store[asked]) == content_of
        assert store.absent([asked, "9", "", "x" * 600, "000000000009"]) == [
            "9",
            "",
            "x" * 600,
            "000000000009",
        ]


def test_paths_below_a_folder(tmp_path):
    for name in ("one/1.jpg", "two/1.JPG", "two/deep/2.webp", "two/notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "secret.jpg").write_text("secret")
    store = open_store(tmp_path / "images")
    assert [store[name].read_text() for name in ("one/1.jpg", "two/1.JPG", "two/deep/2.webp")] == [
        "one/1.jpg",
        "two/1.JPG",
        "two/deep/2.webp",
    ]
    outside = [
        "../secret.jpg",
        "one/../../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "two/notes.txt",
        "two",
        "a\0.jpg",
    ]
    assert store.absent(outside) == outside


# --- folders ---


def test_places_of_a_folder(tmp_path):
    for name in ("b/1.png", "a/1.jpg", "a/deep/2.jpg", "3.JPEG", "a/notes.txt", "c/4.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    store = open_store(tmp_path, ("a", "a/*", "b", "nowhere", ""))
    assert {key: store[key].read_text() for key in sorted(store.keys())} == {
        "1": "a/1.jpg",
        "2": "a/deep/2.jpg",
        "3": "3.JPEG",
    }
    assert str(store) == f"{tmp_path} (a, a/*, b, nowhere)"


# --- bad input ---


def test_what_is_no_store(tmp_path):
    (tmp_path / "images.zip").touch()
    with pytest.raises(
        ValueError, match=r"images\.zip is no \.lmdb or \.parquet file; give a folder"
    ):
        open_store(tmp_path / "images.zip")
    with pytest.raises(ValueError, match=r"nowhere\.lmdb does not exist"):
        open_store(tmp_path / "nowhere.lmdb")


def test_broken_lmdb(tmp_path):
    (tmp_path / "images.lmdb").write_bytes(b"x" * 10_000)
    with pytest.raises(
        ValueError, match=r"images\.lmdb cannot be read as an LMDB file: .*; make it again"
    ):
        open_store(tmp_path / "images.lmdb")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_an_lmdb_file_that_is_cut_off(tmp_path, share):
    path = write_lmdb(tmp_path / "images.lmdb", {f"{i}": bytes(9000) for i in range(50)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        ValueError, match=r"images\.lmdb .*: it ends after [\d,]+ of [\d,]+ bytes; copy it again"
    ):
        open_store(path)


def test_lmdb_as_a_folder(tmp_path):
    with (
        lmdb.open(str(tmp_path / "images"), map_size=1 << 22) as environment,
        environment.begin(write=True) as writer,
    ):
        for key, data in FILES.items():
            writer.put(key.encode(), data)
    store = open_store(tmp_path / "images")
    assert store["2001"] == FILES["2001"]
    assert set(store.keys()) == set(FILES)


def test_without_the_lmdb_package(tmp_path, monkeypatch):
    path = write_lmdb(tmp_path / "images.lmdb", FILES)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
        open_store(path)


def test_broken_parquet(tmp_path):
    path = tmp_path / "images.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="cannot be read as a Parquet file"):
        open_store(path)
    pq.write_table(pa.table({"key": ["1"], "picture": [b"x"]}), path)
    with pytest.raises(ValueError, match="has no column image, only key, picture"):
        open_store(path)
    pq.write_table(pa.table({"image": [b"x"]}), path)
    with pytest.raises(ValueError, match=r"neither a column key nor image\.path"):
        open_store(path)
    with pytest.raises(ValueError, match="row 1 of row group 0 has no key"):
        open_store(write_keys(path, ["1", None], [b"x", b"y"]))
    with pytest.raises(ValueError, match="key '1' repeats"):
        open_store(write_keys(path, ["1", "1"], [b"x", b"y"]))


def test_parquet_without_bytes(tmp_path):
    store = open_store(write_keys(tmp_path / "images.parquet", ["1", "2"], [b"x", None]))
    assert store["1"] == b"x"
    with pytest.raises(BrokenImageError, match="has no bytes for the image '2'"):
        store["2"]


def test_parquet_of_names_opens_no_files(tmp_path):
    for images in (
        [str(PHOTOS / "2001.jpg")],
        [{"path": str(PHOTOS / "2001.jpg")}],
        [{"bytes": "x", "path": "y"}],
    ):
        with pytest.raises(
            ValueError, match=r"column image is of type .*; store the images' bytes in it"
        ):
            open_store(write_keys(tmp_path / "images.parquet", ["1"], images))


def test_damage_inside_a_parquet_file_is_one_line(tmp_path):
    path = write_keys(tmp_path / "images.parquet", ["1", "2"], [bytes(range(256)) * 40] * 2)
    column = pq.read_metadata(path).row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 56] = bytes(56)
    path.write_bytes(data)
    store = open_store(path)
    with pytest.raises(
        BrokenImageError, match=r"cannot be read as a Parquet file: .*; fetch"
    ) as caught:
        store["1"]
    assert "\n" not in str(caught.value)


def test_upright_images_are_marked(store):
    store.upright = True
    assert isinstance(store["2001"], Upright)
    assert open_image(pickle.loads(pickle.dumps(store))["2001"]).size == (48, 32)


def test_a_task_turns_images_on_request(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for key, data in FILES.items():
        Image.open(io.BytesIO(data)).save(tmp_path / f"{key}.jpg", exif=exif)
    task = Retrieval(FIXTURES / "flickr30k", images=tmp_path, negatives=1)
    turned = replace(task, exif="apply")
    for flat, upright in zip(task.examples("test"), turned.examples("test"), strict=True):
        assert (open_image(flat.images[0]).size, open_image(upright.images[0]).size) == (
            (48, 32),
            (32, 48),
        )
    assert open_image(turned.pool("test").images[0]).size == (32, 48)
    with pytest.raises(ValueError, match="exif is True; it is one of ignore, apply"):
        replace(task, exif=True).examples("test")


def test_kinds_are_told_apart(tmp_path):
    assert isinstance(open_store(PHOTOS), Folder)
    assert isinstance(open_store(write_lmdb(tmp_path / "i.lmdb", FILES)), LMDB)
    assert isinstance(open_store(write_parquet(tmp_path / "i.parquet", FILES)), Parquet)
    assert isinstance(open_store(tmp_path), Parquet)
