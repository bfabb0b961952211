"""extras/parquet.py: rows are images with their classes, through all shards of a set."""

import os
import sys

import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from pyarrow import parquet

from data.sources import find_source
from tests.conftest import refused
from tests.data.packing import IMAGES, encoded, labels_of, load

PICTURE = encoded(IMAGES[0])


def write_rows(path, rows, metadata=None, **columns):
    """Write a parquet file whose column `image` has these rows, beside others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": rows, **columns})
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def write_images(path, images=IMAGES):
    """Write the images as the package `datasets` does; return the path."""
    write_rows(path, [{"bytes": encoded(image), "path": "the same name"} for image in images])
    return path


def test_one_file_and_several_shards_are_the_same_set(tmp_path):
    shards = tmp_path / "shards"
    for name, part in (("b", IMAGES[6:]), ("a", IMAGES[:6])):
        write_images(shards / "data" / f"{name}.parquet", part)
    # macOS writes such files beside others.
    (shards / "data" / "._a.parquet").write_bytes(b"metadata")
    (shards / "README.md").touch()
    one = load(write_images(tmp_path / "one.Parquet"))
    several = load(shards)
    for image_set in (one, several):
        assert_array_equal(image_set.images, IMAGES)
        assert image_set.ids == list(range(10))
    assert (one.names[6], several.names[6]) == ("6", "data/b.parquet/6")
    assert several.summary.endswith("; 1 other files")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = write_images(tmp_path / "set.parquet")
    original = parquet.ParquetFile

    def replaced(path):
        file = original(path)
        write_images(tmp_path / "new", 255 - IMAGES)
        os.replace(tmp_path / "new", path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "ParquetFile", replaced)
        assert_array_equal(load(path).images, IMAGES)
    assert_array_equal(load(path).images, 255 - IMAGES)


def test_what_has_no_images_or_is_damaged_is_refused(tmp_path):
    write_rows(tmp_path / "bytes.parquet", [b"1"])
    write_rows(tmp_path / "lists.parquet", [[{"bytes": PICTURE}]])
    (tmp_path / "text.parquet").write_bytes(b"a text")
    for name, reason in (
        ("bytes", "has 0 columns of encoded images"),
        ("lists", "has 0 columns of encoded images"),
        ("text", r"cannot be read \(Arrow"),
    ):
        with refused(f"{name}.parquet {reason}"):
            find_source(tmp_path / f"{name}.parquet")


def test_a_row_without_an_image_is_one_bad_image(tmp_path):
    path = tmp_path / "set.parquet"
    write_rows(path, [{"bytes": PICTURE}, None, {"bytes": None}])
    with refused(r"set.parquet: 2 of 3 .*: 1 \(empty file\), 2 \(empty file\)"):
        load(path)


def test_without_pyarrow_it_says_what_is_missing(tmp_path, monkeypatch):
    path = write_images(tmp_path / "set.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with refused("needs pyarrow: python -m pip install pyarrow"):
        find_source(path)


@pytest.mark.parametrize(
    "metadata, column, expected",
    [
        (
            '{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}',
            [1, 0, 1],
            "dog, cat, dog",
        ),
        ('{"info": {"features": 5}}', [1, 0, 1], "1, 0, 1"),
        # That is none, and neither is the folder one.
        ("{}", [1, -1, 0], "has no label for data/a.parquet/1"),
        # It is no JSON.
        (9**5 * "[", [1, 0, 1], "a.parquet: the labels cannot be read"),
    ],
    ids=["names", "numbers", "none", "hostile"],
)
def test_a_row_has_the_class_of_its_column(metadata, column, expected, tmp_path):
    """By the names of Hugging Face's metadata, else by its number."""
    path = tmp_path / "data" / "a.parquet"
    write_rows(path, [{"bytes": PICTURE}] * 3, {"huggingface": metadata}, label=column)
    assert expected in labels_of(tmp_path)
