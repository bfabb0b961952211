"""data/sources.py: every form of a set is found and ordered alike, and strays are not."""

import json
import os
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from pyarrow import parquet

from data.sources import find_source
from tests.conftest import posix, refused
from tests.data.packing import (
    IMAGES,
    TREE,
    encoded,
    load,
    name_of,
    write_folder,
    write_npz,
    write_zip,
)

PICTURE = encoded(IMAGES[0])
NUMBERS = list(range(len(IMAGES)))
LAYOUTS = {
    "official tree": f"thumbnails128x128/{TREE}",
    "jpeg": "resized/{number:05d}.jpg",
    "upper case": "{number:05d}.PNG",
    "dataset_tool": "{folder:05d}/img{number:08d}.png",
    "folders in another order": "{mixed}/{number:05d}.png",
    "unpadded": "{number}.bmp",
}

# These lie in copies of FFHQ without being images of it.
STRAYS = ("LICENSE.txt", "dataset.json", "__MACOSX/00003.png", "thumbnails128x128/._00004.png")


@pytest.mark.parametrize("pattern", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("write, name", [(write_folder, "set"), (write_zip, "set.ZIP")])
def test_every_layout_is_numbered_alike(tmp_path, pattern, write, name):
    path = write(tmp_path / name, pattern=pattern, more=dict.fromkeys(STRAYS, PICTURE))
    names = [name_of(number, pattern) for number in NUMBERS]

    source = find_source(path)
    assert list(source.members) == NUMBERS
    assert [member.name for member in source.members.values()] == names


def write_parquet(path, images=IMAGES, pattern="{number:05d}.png"):
    """Write the images as the package `datasets` does, with a label each; return the path."""
    rows = [{"bytes": encoded(image), "path": "the same name"} for image in images]
    parquet.write_table(pa.table({"label": [0] * len(rows), "image": rows}), path)
    return path


WRITERS = {".zip": write_zip, ".parquet": write_parquet, ".npz": write_npz}


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_archive_and_several_shards_are_the_same_set(tmp_path, suffix):
    write = WRITERS[suffix]
    one = write(tmp_path / f"one{suffix}")
    (tmp_path / "shards" / "data").mkdir(parents=True)
    # The shards have 6 and 4 images. Those of zips have numbers of their own.
    for name, part, first in (("b", IMAGES[6:], 6), ("a", IMAGES[:6], 0)):
        shard = tmp_path / "shards" / "data" / f"{name}{suffix}"
        options = [] if suffix == ".npz" else [f"{first // 6}{{number:04d}}.png"]
        write(shard, part, *options)
    # A preview beside shards is not the set.
    write_folder(tmp_path / "shards", IMAGES[:1])

    # macOS writes such files beside others.
    (tmp_path / "shards" / "data" / f"._a{suffix}").write_bytes(b"metadata")
    for path in (one, tmp_path / "shards"):
        image_set = load(path)
        assert_array_equal(image_set.images, IMAGES)
        assert image_set.ids == sorted(image_set.ids)
    rows = suffix in (".parquet", ".npz")
    assert image_set.ids == (NUMBERS if rows else [*NUMBERS[:6], 10_000, 10_001, 10_002, 10_003])


def test_shards_with_the_same_numbers_keep_their_names(tmp_path):
    for name in ("a.zip", "b.zip"):
        write_zip(tmp_path / name, IMAGES[:1])
    assert list(find_source(tmp_path).members) == ["a.zip/00000.png", "b.zip/00000.png"]


def test_images_beside_archives(tmp_path):
    # One image beside shards is a preview.
    path = write_folder(tmp_path / "set", IMAGES[:1])
    write_zip(path / "a.zip")
    assert find_source(path).ignored == {".png": 1}

    # One archive is none of the images. Two may be masks or shards.
    write_folder(path)
    assert find_source(path).ignored == {".zip": 1}
    write_npz(path / "masks" / "b.npz", IMAGES)
    with refused(r"10 images, such as 00000.png, and 2 archives, such as a"):
        find_source(path)


def test_samples_inside_the_data_are_no_data(tmp_path):
    path = write_folder(tmp_path / "set")
    samples = write_folder(path / "samples")
    (samples / "samples.json").write_text(json.dumps({"sampler": "ddpm"}, indent=2))
    # Other projects have such files, too.
    (path / "samples.json").write_text('{"images": 10}')
    source = find_source(path)
    assert list(source.members) == NUMBERS
    assert source.ignored == {"folder of samples": 1, ".json": 1}
    assert list(find_source(samples).members) == NUMBERS


@pytest.mark.parametrize(
    "names",
    [
        # One number comes twice, and one name has none.
        "a/1.png a/10.png a/2.png b/1.png zoe.jpeg",
        # There are two series.
        "cat_10.png cat_2.png dog_3.png",
        "größe.png 人.png",
    ],
)
def test_names_without_one_series_of_numbers_are_sorted_and_kept_whole(tmp_path, names):
    names = names.split()
    write_folder(tmp_path, [], more=dict.fromkeys(reversed(names), PICTURE))
    assert list(find_source(tmp_path).members) == sorted(names)


def test_linked_folders_are_read(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    elsewhere = write_folder(tmp_path / "elsewhere", pattern=TREE)
    (root / "thumbnails").symlink_to(elsewhere)
    assert list(find_source(root).members) == NUMBERS

    # With images read twice, the ids would be names.
    (root / "again").symlink_to(root)
    (elsewhere / "00004" / "up").symlink_to(elsewhere)
    (elsewhere / "00004" / "out").symlink_to(root)
    assert list(find_source(root).members) == NUMBERS


@posix
def test_what_is_no_file_is_one_bad_image(tmp_path):
    path = write_folder(tmp_path / "set")
    os.mkfifo(path / "00010.png")
    (path / "00011.png").symlink_to("nowhere.png")
    # A folder is no image.
    (path / "00012.png").mkdir()

    with refused(r"set: 2 unusable image.* \(not a file\)"):
        load(path)
    assert load(path, max_bad_images=2).ids == NUMBERS

    # Once the link leads to a file, the pack is outdated.
    (path / "nowhere.png").write_bytes(PICTURE)
    assert len(load(path, max_bad_images=1).ids) == 12


def test_names_in_a_zip_are_no_paths_and_of_one_name_the_last_image_counts(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t/00001.png", b"before")
        # Some programs for Windows write backslashes.
        archive.writestr("t\\00001.png", b"one")
        archive.writestr("t\\", b"")
        archive.writestr("/etc/00000.png", b"zero")
        archive.writestr("../00002.png", b"two")

    source = find_source(path)

    # A name that leads out of the archive is hidden; the others are read within it.
    assert list(source.members) == [0, 1]
    assert source.ignored == {"hidden": 1, "of a repeated name": 1}
    assert [member.name for member in source.members.values()] == ["/etc/00000.png", "t/00001.png"]
    assert [member.read() for member in source.members.values()] == [b"zero", b"one"]


def test_arrays_and_tables_without_one_set_of_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", IMAGES, IMAGES)
    # Labels beside the images do no harm, but here are no images.
    np.savez(tmp_path / "float.npz", IMAGES / 255, np.arange(10))
    np.savez(tmp_path / "empty.npz", np.zeros((5, 0, 20, 3), np.uint8))
    # PyTorch's order of the axes is another one.
    np.savez(tmp_path / "torch.npz", IMAGES.transpose(0, 3, 1, 2))
    parquet.write_table(pa.table({"image": [b"1"]}), tmp_path / "bytes.parquet")
    lists = [[{"bytes": PICTURE, "path": "a name"}]]
    parquet.write_table(pa.table({"image": lists}), tmp_path / "lists.parquet")
    for path in tmp_path.iterdir():
        with refused(rf"{path.name} has . (uint8 arrays|columns).* must have one"):
            find_source(path)


def test_an_archive_that_the_disk_does_not_give_is_not_called_damaged(tmp_path):
    for name in ("a.zip", "a.npz", "a.parquet"):
        folder = tmp_path / name[2:]
        folder.mkdir()
        (folder / name).symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=f"/{name}'"):
            find_source(folder)


def test_a_row_without_an_image_is_one_bad_image(tmp_path):
    path = tmp_path / "set.parquet"
    rows = [{"bytes": PICTURE, "path": "a name"}, None, {"bytes": None, "path": "a name"}]
    parquet.write_table(pa.table({"image": rows}), path)
    with refused(r"set.parquet: 2 unusable.*: 1 \(empty file\), 2 \(empty file\)"):
        load(path)
    assert load(path, max_bad_images=2).ids == [0]
    parquet.write_table(pa.table({"image": [{"bytes": "a text"}, {"bytes": "another"}]}), path)
    with refused("none of its images can be used: 0: empty file"):
        load(path, max_bad_images=2)


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "set.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with refused("needs pyarrow: python -m pip install pyarrow"):
        find_source(path)


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    write_folder(tmp_path / "tars", [], more={"a.tar": b""})
    (tmp_path / "text.zip").write_bytes(b"no archive")
    (tmp_path / "text.tar.gz").write_bytes(b"no archive")
    np.save(tmp_path / "array.npy", IMAGES)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    header = b"\x93NUMPY\x01\x00\x0e\x00{'shape': (10,"
    write_zip(tmp_path / "header.npz", [], more={"a.npy": header})

    unpack = r"Give a folder of images \(.png, .*\), or one of .zip, .npz, .parquet; a tar must be"
    unusable = r"cannot be read \(.*\). Either its download was cut short, or it is no "
    for name, message in (
        ("missing.zip", f"does not exist. {unpack}"),
        ("tars", f"contains no image that can be read; ignored: 1 .tar. {unpack}"),
        ("text.tar.gz", f"contains no image that can be read. {unpack}"),
        ("text.zip", f"{unusable}.zip file"),
        ("array.npz", f"{unusable}.npz file"),
        ("header.npz", f"{unusable}.npz file"),
    ):
        with refused(f"{name} {message}"):
            find_source(tmp_path / name)
