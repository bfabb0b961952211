"""data/sources.py: every form of a set is found and ordered alike, and strays are not."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from pyarrow import parquet

from data.datasets import split_images
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
    elsewhere = write_folder(tmp_path / "elsewhere", pattern=TREE)
    (root / "thumbnails").symlink_to(elsewhere)
    assert find_source(root).ids == NUMBERS

    # With images read twice, the ids would be names.
    (root / "again").symlink_to(root)
    (elsewhere / "00004" / "up").symlink_to(elsewhere)
    (elsewhere / "00004" / "out").symlink_to(root)
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


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, "tar"])
def test_a_tar_with_a_bad_header_or_without_its_end_is_refused(tmp_path, tar_format):
    path = tmp_path / "set.tar"
    folder = write_folder(tmp_path / "set")
    if tar_format == "tar" and shutil.which("tar"):
        subprocess.run(["tar", "-cf", path, "-C", folder, "."], check=True)
    else:
        with tarfile.open(path, "w", format=tar_format) as archive:
            archive.add(folder, "")
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive.getmembers() if member.isfile()]
        end = archive.offset + 1024
    assert len(headers) == 10
    cut_short = [whole[:size] for size in range(0, end, 128)]
    # A bit of each member's name is another one.
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in headers]
    for content in cut_short + flipped:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"set.tar cannot be read"):
            find_source(path)
    # What follows the end is nothing but padding.
    path.write_bytes(whole[:end])
    assert find_source(path).ids == NUMBERS


def test_what_is_no_image_in_a_tar_is_one_bad_image(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(write_folder(tmp_path / "set"), "")
        for number, kind in ((10, tarfile.FIFOTYPE), (11, tarfile.SYMTYPE), (12, tarfile.LNKTYPE)):
            member = tarfile.TarInfo(f"{number}.png")
            member.type = kind
            member.linkname = "nowhere.png"
            archive.addfile(member)
        # A folder is no image in a folder or a zip, either.
        member = tarfile.TarInfo("13.png")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)

    with pytest.raises(UserError, match=r"set.tar: 3 unusable.*first is 10.png \(not a file\)"):
        load(path)
    pack = load(path, max_bad_images=3)
    assert pack.ids == NUMBERS
    for name, reason in pack.bad_images[1:]:
        assert name in ("11.png", "12.png")
        assert "cannot be read (KeyError" in reason


def test_names_that_are_not_utf_8_are_names(tmp_path):
    names = [os.fsdecode(b"\xff%d.png" % number) for number in NUMBERS]
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PICTURE)
            archive.addfile(member, io.BytesIO(PICTURE))
    image_set = load(path)
    assert image_set.ids == names
    split = split_images(image_set, "reference")
    assert len(split.train_indices) + len(split.val_indices) == 10
    # A terminal shows the byte as Python writes it.
    assert r"such as \udcff" in split.description


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
    # PyTorch's order of the axes is another one.
    np.savez(tmp_path / "torch.npz", IMAGES.transpose(0, 3, 1, 2))
    parquet.write_table(pa.table({"image": [b"1"]}), tmp_path / "bytes.parquet")
    lists = [[{"bytes": PICTURE, "path": "a name"}]]
    parquet.write_table(pa.table({"image": lists}), tmp_path / "lists.parquet")
    for name in ("two.npz", "float.npz", "torch.npz", "bytes.parquet", "lists.parquet"):
        with pytest.raises(
            UserError, match=rf"{name} has . (uint8 arrays|columns).* must have one"
        ):
            find_source(tmp_path / name)


def test_a_row_without_an_image_is_one_bad_image(tmp_path):
    path = tmp_path / "set.parquet"
    rows = [{"bytes": PICTURE, "path": "a name"}, None, {"bytes": None, "path": "a name"}]
    parquet.write_table(pa.table({"image": rows}), path)
    with pytest.raises(UserError, match=r"set.parquet: 2 unusable.* first is 1 \(empty file\)"):
        load(path)
    assert load(path, max_bad_images=2).ids == [0]


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
        ("text.zip", r"no image \(.png.*\); ignored: 1 .txt"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            find_source(tmp_path / name)
