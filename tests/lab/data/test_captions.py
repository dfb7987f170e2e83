"""The reader of image-caption files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pumer.lab.data.captions import Captions
from pumer.lab.data.images import open_image

FIXTURE = Path(__file__).parents[2] / "data" / "captions4.parquet"


def changed(tmp_path, change):
    """The fixture with its rows passed through `change`, as a file."""
    table = pq.read_table(FIXTURE)
    path = tmp_path / "captions.parquet"
    pq.write_table(
        pa.Table.from_pylist([change(i, row) for i, row in enumerate(table.to_pylist())]), path
    )
    return path


def test_reads_the_rows():
    captions = Captions(FIXTURE)
    assert len(captions) == 4
    assert [row.caption_group == captions[0].caption_group for row in captions] == [
        True,
        True,
        False,
        False,
    ]
    for row in captions:
        assert max(open_image(row.image, row.id).size) == 150
        assert row.caption.strip()
        assert "U.S. Government" in row.rights
    assert captions[-1] == captions[3]
    with pytest.raises(IndexError):
        captions[4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, row: row | {"id": "same"}, "3 of 4 rows repeat an id"),
        (
            lambda i, row: row | {"caption": " " if i == 1 else "A farm."},
            "1 rows have no caption, for example 2017877343",
        ),
        (
            lambda i, row: {k: v for k, v in row.items() if k not in ("rights", "id")},
            "no column id, rights",
        ),
        (
            lambda i, row: row | {"image": {"bytes": None if i else b"", "path": "a.jpg"}},
            "3 of 4 rows hold no image",
        ),
        (
            lambda i, row: row | {"image": "a.jpg"},
            "image is of type string; store the images' bytes",
        ),
    ],
)
def test_bad_rows(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Captions(changed(tmp_path, change))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"none\.parquet does not exist"):
        Captions(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet here")
    with pytest.raises(ValueError, match=r"text\.parquet cannot be read"):
        Captions(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("name", "rows"), [("fsac_train", 1148), ("fsac_dev", 147), ("photos640", 133)]
)
def test_real_files(shared, name, rows):
    path = shared / "data" / "photos" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the reference data")
    captions = Captions(path)
    assert len(captions) == rows
    assert open_image(captions[rows - 1].image).mode == "RGB"
