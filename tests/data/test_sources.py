"""data/sources.py: every form of a set is found and ordered alike, and strays are not."""

import os
import shutil
import sys
import tarfile
import time
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from pyarrow import parquet

from data.sources import find_source
from functions.support.errors import UserError
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
@pytest.mark.parametrize(("write", "name"), [(write_folder, "set"), (write_zip, "set.ZIP")])
def test_every_layout_is_numbered_alike(tmp_path, pattern, write, name):
    path = write(tmp_path / name, pattern=pattern, more=dict.fromkeys(STRAYS, PICTURE))
    names = [name_of(number, pattern) for number in NUMBERS]

    source = find_source(path)
    assert source.ids == NUMBERS
    assert [member.name for member in source.members] == names


def write_tar(path, images=IMAGES, pattern="{number:05d}.png"):
    """Write the images, and what a WebDataset has beside them, to a tar; return its path."""
    folder = write_folder(path.with_suffix(".files"), images, pattern, {"00003.json": b"{}"})
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "")
    shutil.rmtree(folder)
    return path


def write_parquet(path, images=IMAGES, pattern="{number:05d}.png"):
    """Write the images as the package `datasets` does, with a label each; return the path."""
    rows = [{"bytes": encoded(image), "path": "the same name"} for image in images]
    parquet.write_table(pa.table({"label": [0] * len(rows), "image": rows}), path)
    return path


WRITERS = {".zip": write_zip, ".tar": write_tar, ".parquet": write_parquet, ".npz": write_npz}


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_archive_and_several_shards_are_the_same_set(tmp_path, suffix):
    write = WRITERS[suffix]
    one = write(tmp_path / f"one{suffix}")
    (tmp_path / "shards" / "data").mkdir(parents=True)
    # The shards have 6 and 4 images. Those of zips and tars have numbers of their own.
    for name, part, first in (("b", IMAGES[6:], 6), ("a", IMAGES[:6], 0)):
        shard = tmp_path / "shards" / "data" / f"{name}{suffix}"
        options = [] if suffix == ".npz" else [f"{first // 6}{{number:04d}}.png"]
        write(shard, part, *options)
    # Previews beside shards are not the set.
    write_folder(tmp_path / "shards", IMAGES[:2])

    # macOS writes such files beside others.
    (tmp_path / "shards" / "data" / f"._a{suffix}").write_bytes(b"metadata")
    for path in (one, tmp_path / "shards"):
        image_set = load(path)
        assert_array_equal(image_set.images, IMAGES)
        assert image_set.ids == sorted(image_set.ids)
    rows = suffix in (".parquet", ".npz")
    assert image_set.ids == (NUMBERS if rows else [*NUMBERS[:6], 10_000, 10_001, 10_002, 10_003])


def test_shards_with_the_same_numbers_keep_their_names(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, IMAGES[:1])
    assert find_source(tmp_path).ids == ["a.tar/00000.png", "b.tar/00000.png"]


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
    assert find_source(tmp_path).ids == sorted(names)


def test_several_copies_of_ffhq_are_refused(tmp_path):
    for layout in ("thumbnails128x128", "images1024x1024"):
        write_folder(tmp_path / layout)
    with pytest.raises(UserError, match="images1024x1024 and thumbnails128x128, copies of one set"):
        find_source(tmp_path)
    assert find_source(tmp_path / layout).ids == NUMBERS


def test_linked_folders_are_read(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (root / "thumbnails").symlink_to(write_folder(tmp_path / "elsewhere"))
    assert find_source(root).ids == NUMBERS


def test_a_link_in_a_tar_is_the_file_it_leads_to(tmp_path):
    folder = write_folder(tmp_path / "set")
    # tar stores the second name of a file as a hard link, without content.
    os.link(folder / "00009.png", folder / "00010.png")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, "set")
        assert any(member.islnk() for member in archive.getmembers())

    images = load(tmp_path / "set.tar").images
    assert len(images) == 11
    assert_array_equal(images[10], IMAGES[9])


def test_seventy_shards_of_a_thousand_images_are_listed_in_seconds(tmp_path):
    # Here are 5,000 members, a fourteenth of FFHQ.
    for shard in range(5):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(1000):
                archive.addfile(tarfile.TarInfo(f"{1000 * shard + number:05d}.png"))
    start = time.process_time()
    assert find_source(tmp_path).ids == list(range(5000))
    assert time.process_time() - start < 5


def test_a_tar_that_is_cut_short_is_refused(tmp_path):
    path = write_tar(tmp_path / "set.tar")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read"):
        find_source(path)


def test_names_in_a_zip_are_no_paths(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t/00001.png", b"one")
        archive.writestr("/etc/00000.png", b"zero")
        archive.writestr("../00002.png", b"two")

    source = find_source(path)

    # A name that leads out of the archive is hidden; the others are read within it.
    assert source.ids == [0, 1]
    assert [member.read() for member in source.members] == [b"zero", b"one"]


def test_arrays_and_tables_without_one_set_of_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", IMAGES, IMAGES)
    # Labels beside the images do no harm, but here are no images.
    np.savez(tmp_path / "float.npz", IMAGES / 255, np.arange(10))
    parquet.write_table(pa.table({"image": [b"1"]}), tmp_path / "bytes.parquet")
    for name in ("two.npz", "float.npz", "bytes.parquet"):
        with pytest.raises(UserError, match="and must have one"):
            find_source(tmp_path / name)


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "set.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow: python -m pip install pyarrow"):
        find_source(path)


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    write_zip(tmp_path / "text.zip", [], more={"readme.txt": b"no image"})

    for name, message in (
        ("missing.zip", "does not exist"),
        ("empty", "no image"),
        ("a.zip", r"cannot be read \(File is not a zip file\)"),
        ("a.tar.gz", "only files with names that end with .zip, .tar"),
        ("text.zip", "no image"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            find_source(tmp_path / name)
