"""data/sources.py: every form of a set is found and ordered alike, and strays are not."""

import os
import sys

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from pyarrow import parquet

from data.sources import find_source
from tests.conftest import posix, refused
from tests.data.packing import IMAGES, TREE, encoded, load, write_folder, write_npz, write_zip

PICTURE = encoded(IMAGES[0])
NUMBERS = list(range(len(IMAGES)))
LAYOUTS = [f"thumbnails128x128/{TREE}", "img{number:08d}.JPG", "resized/{number}.bmp"]

# These lie in copies of FFHQ without being images of it.
STRAYS = ("LICENSE.txt", "dataset.json", "__MACOSX/00003.png", "thumbnails128x128/._00004.png")


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("write, name", [(write_folder, "set"), (write_zip, "set.ZIP")])
def test_every_layout_is_numbered_alike(tmp_path, pattern, write, name):
    path = write(tmp_path / name, pattern=pattern, more=dict.fromkeys(STRAYS, PICTURE))
    members = find_source(path).members
    assert list(members) == NUMBERS
    assert all(f"{number}." in members[number].name for number in NUMBERS)


def write_rows(path, rows):
    """Write a parquet file whose column `image` has these rows."""
    parquet.write_table(pa.table({"image": rows}), path)


def write_parquet(path, images=IMAGES):
    """Write the images as the package `datasets` does; return the path."""
    write_rows(path, [{"bytes": encoded(image), "path": "the same name"} for image in images])
    return path


WRITERS = {".zip": write_zip, ".parquet": write_parquet, ".npz": write_npz}


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_archive_and_several_shards_are_the_same_set(tmp_path, suffix):
    write = WRITERS[suffix]
    one = write(tmp_path / f"one{suffix}")
    # A preview beside shards is not the set.
    shards = write_folder(tmp_path / "shards", IMAGES[:1])
    (shards / "data").mkdir()
    for name, part in (("b", IMAGES[6:]), ("a", IMAGES[:6])):
        write(shards / "data" / f"{name}{suffix}", part)
    # macOS writes such files beside others.
    (shards / "data" / f"._a{suffix}").write_bytes(b"metadata")

    for path in (one, shards):
        image_set = load(path)
        assert_array_equal(image_set.images, IMAGES)
    # Rows are numbered through all shards. Files with the same numbers keep their names.
    assert image_set.ids[6] == ("data/b.zip/00000.png" if suffix == ".zip" else 6)


def test_images_beside_archives(tmp_path):
    # One image beside shards is a preview.
    path = write_folder(tmp_path, IMAGES[:1])
    write_zip(path / "a.zip")
    assert find_source(path).ignored == {".png": 1}

    # One archive is none of the images. Two may be masks or shards.
    write_folder(path)
    assert find_source(path).ignored == {".zip": 1}
    write_npz(path / "b.npz")
    with refused("10 images, such as 00000.png, and 2 archives, such as a"):
        find_source(path)


def test_samples_inside_the_data_are_no_data(tmp_path):
    more = {"samples.json": '{"sampler": "ddpm"}'}
    samples = write_folder(tmp_path / "samples", more=more)
    # Other projects have such files, too.
    write_folder(tmp_path / "theirs", more={"samples.json": '{"images": 10}'})
    source = find_source(tmp_path)
    assert list(source.members) == NUMBERS
    assert source.ignored == {"folder of samples": 1, ".json": 1}
    assert list(find_source(samples).members) == NUMBERS


@pytest.mark.parametrize(
    "names",
    [
        # One number comes twice, one has none, and there are two series.
        ["a/1.png", "a/10.png", "a/2.png", "b/1.png"],
        ["10.jpeg", "2.gif", "größe.png", "人.png"],
        ["cat_10.png", "cat_2.png", "dog_3.png"],
    ],
)
def test_names_without_one_series_of_numbers_are_sorted_and_kept_whole(tmp_path, names):
    write_folder(tmp_path, [], more=dict.fromkeys(reversed(names), PICTURE))
    assert list(find_source(tmp_path).members) == sorted(names)


def test_linked_folders_are_read(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    elsewhere = write_folder(tmp_path / "elsewhere", pattern=TREE)
    (root / "thumbnails").symlink_to(elsewhere)
    # With images read twice, the ids would be names.
    (elsewhere / "00003" / "up").symlink_to(elsewhere)
    assert list(find_source(root).members) == NUMBERS


@posix
def test_what_is_no_file_is_one_bad_image(tmp_path):
    path = write_folder(tmp_path / "set")
    os.mkfifo(path / "00010.png")
    link = path / "00011.png"
    link.symlink_to("../nowhere.png")
    # A folder is no image.
    (path / "00012.png").mkdir()

    with refused(r"set: 2 unusable image.* \(not a file\)"):
        load(path)
    assert load(path, max_bad_images=2).ids == NUMBERS

    # Once the link leads to a file, the pack is outdated.
    link.resolve().write_bytes(PICTURE)
    assert load(path, max_bad_images=1).ids == [*NUMBERS, 11]


def test_names_in_a_zip_are_no_paths_and_of_one_name_the_last_image_counts(tmp_path):
    files = {
        "t/00001.png": b"before",
        # Some programs for Windows write backslashes.
        "t\\00001.png": b"one",
        "t\\": b"",
        "/etc/00000.png": b"zero",
        "../00002.png": b"two",
    }
    source = find_source(write_zip(tmp_path / "a.zip", [], more=files))

    # A name that leads out of the archive is hidden; the others are read within it.
    found = {number: (each.name, each.read()) for number, each in source.members.items()}
    assert found == {0: ("/etc/00000.png", b"zero"), 1: ("t/00001.png", b"one")}
    assert source.ignored == {"hidden": 1, "of a repeated name": 1}


def test_arrays_and_tables_without_one_set_of_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", IMAGES, IMAGES)
    # Labels beside the images do no harm, but here are no images.
    np.savez(tmp_path / "float.npz", IMAGES / 255, np.arange(10))
    np.savez(tmp_path / "empty.npz", np.zeros((5, 0, 20, 3), np.uint8))
    # PyTorch's order of the axes is another one.
    np.savez(tmp_path / "torch.npz", IMAGES.transpose(0, 3, 1, 2))
    write_rows(tmp_path / "bytes.parquet", [b"1"])
    write_rows(tmp_path / "lists.parquet", [[{"bytes": PICTURE}]])
    for path in tmp_path.iterdir():
        with refused(rf"{path.name} has . (uint8 arrays|columns).* must have one"):
            find_source(path)


def test_an_archive_that_the_disk_does_not_give_is_not_called_damaged(tmp_path):
    for suffix in WRITERS:
        archive = tmp_path / f"a{suffix}"
        archive.symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=f"/{archive.name}'"):
            find_source(tmp_path)
        archive.unlink()


def test_a_row_without_an_image_is_one_bad_image(tmp_path):
    path = tmp_path / "set.parquet"
    write_rows(path, [{"bytes": PICTURE}, None, {"bytes": None}])
    with refused(r"set.parquet: 2 unusable.*: 1 \(empty file\), 2 \(empty file\)"):
        load(path)
    assert load(path, max_bad_images=2).ids == [0]
    write_rows(path, [{"bytes": "a text"}])
    with refused("none of its images can be used: 0: empty file"):
        load(path)


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "set.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with refused("needs pyarrow: python -m pip install pyarrow"):
        find_source(path)


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    files = {"tars/a.tar": b"", "text.zip": b"no archive", "text.tar.gz": b"no archive"}
    write_folder(tmp_path, [], more=files)
    header = b"\x93NUMPY\x01\x00\x0e\x00{'shape': (10,"
    write_zip(tmp_path / "header.npz", [], more={"a.npy": header})

    unpack = r"Give a folder of images \(.png, .*\), or one of .zip, .npz, .parquet; a tar must be"
    unusable = r"cannot be read \(.*\). Either its download was cut short, or it is no "
    for name, message in (
        ("missing.zip", f"does not exist. {unpack}"),
        ("tars", f"contains no image that can be read; ignored: 1 .tar. {unpack}"),
        ("text.tar.gz", f"contains no image that can be read. {unpack}"),
        ("text.zip", f"{unusable}.zip file"),
        ("header.npz", f"{unusable}.npz file"),
    ):
        with refused(f"{name} {message}"):
            find_source(tmp_path / name)
