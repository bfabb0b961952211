"""data/sources.py: every layout of FFHQ is found and ordered alike.

Hostile and stray members are not.
"""

import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from data.datasets import find_ffhq
from data.sources import find_source
from functions.support.errors import UserError
from tests.conftest import posix
from tests.data.packing import IMAGES, TREE, encoded, load, name_of, write_folder, write_zip

PICTURE = encoded(IMAGES[0])
NUMBERS = list(range(len(IMAGES)))
LAYOUTS = {
    "official tree": f"thumbnails128x128/{TREE}",
    "flat": "thumbnails128x128/{number:05d}.png",
    "bare": "{number:05d}.png",
    "jpeg": "resized/{number:05d}.jpg",
    "upper case": "{number:05d}.PNG",
    "webp": "{number:05d}.webp",
    "large": f"images1024x1024/{TREE}",
    "dataset_tool": "{folder:05d}/img{number:08d}.png",
    "folders in another order": "{mixed}/{number:05d}.png",
    "unpadded": "{number}.bmp",
}

# These lie in copies of FFHQ without being images of it.
STRAYS = ("LICENSE.txt", "dataset.json", "__MACOSX/00003.png", "thumbnails128x128/._00004.png")


@pytest.mark.parametrize("pattern", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_folder, "set"),
        (write_zip, "set.ZIP"),
    ],
)
def test_every_layout_is_numbered_alike(tmp_path, pattern, write, name):
    path = write(tmp_path / name, pattern=pattern, more=dict.fromkeys(STRAYS, PICTURE))
    names = [name_of(number, pattern) for number in NUMBERS]

    for numbered in (False, True):
        source = find_source(path, 8, numbered=numbered)
        assert source.ids == NUMBERS
        assert [member.name for member in source.members] == names


@pytest.mark.parametrize(
    "names",
    [
        # One number comes twice, and one name has none.
        "a/1.png a/10.png a/2.png b/1.png zoe.jpeg",
        # There are two series.
        "cat_10.png cat_2.png dog_3.png",
    ],
)
def test_names_without_one_series_of_numbers_are_sorted_and_kept_whole(tmp_path, names):
    names = names.split()
    write_folder(tmp_path, [], more=dict.fromkeys(reversed(names), PICTURE))
    assert find_source(tmp_path, 8).ids == names


@pytest.mark.parametrize(
    ("strays", "passed_over"),
    [
        (["preview.png"], True),
        # Two of 101 are more than a hundredth.
        (["preview.png", "title.png"], False),
    ],
)
def test_few_unnumbered_images_among_many_numbered_ones_are_passed_over(
    tmp_path, strays, passed_over
):
    more = dict.fromkeys(strays, PICTURE)
    path = write_zip(tmp_path / "set.zip", [IMAGES[0]] * 99, more=more)
    assert (find_source(path, 8).ids == list(range(99))) == passed_over


def test_of_two_copies_one_is_read(tmp_path):
    for layout in ("thumbnails128x128", "images1024x1024", "in-the-wild-images"):
        write_folder(tmp_path / layout)

    # The smallest copy that need not be enlarged is chosen.
    for image_size, chosen in (
        (64, "thumbnails128x128"),
        (128, "thumbnails128x128"),
        (256, "images1024x1024"),
    ):
        source = find_source(tmp_path, image_size, numbered=True)
        assert {member.name.split("/")[0] for member in source.members} == {chosen}
        assert source.ids == NUMBERS
        assert chosen in source.notes[0]


def test_where_numbers_are_needed_other_images_are_passed_over(tmp_path):
    write_folder(tmp_path, more={"ffhq-teaser.png": PICTURE})
    source = find_source(tmp_path, 8, numbered=True)
    assert source.ids == NUMBERS
    assert "ffhq-teaser.png" in source.notes[0]


def test_where_numbers_are_needed_none_may_come_twice(tmp_path):
    write_folder(tmp_path / "one", more={"ffhq-teaser.png": PICTURE})
    write_folder(tmp_path / "two")

    # Where numbers are not needed, all images are read.
    assert len(find_source(tmp_path, 8).ids) == 21
    with pytest.raises(UserError, match=r"2 images have the number \d\. Keep only one copy"):
        find_source(tmp_path, 8, numbered=True)


def test_names_of_zip_members_are_no_paths(tmp_path):
    """Nothing is extracted, so the worst that a name can do is to name an image."""
    link = zipfile.ZipInfo("00098.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    more = dict.fromkeys(["/etc/00090.png", "C:\\00093.png", "../00091.png"], PICTURE)
    more[link] = b"/etc/passwd"
    path = write_zip(tmp_path / "set.zip", more=more)

    source = find_source(path, 8)

    # A name that leads out of the archive is skipped; the others are read within it.
    assert source.ids == [*NUMBERS, 90, 93, 98]
    assert source.read(10) == PICTURE
    # Of a link, it reads where the link leads, and does not go there.
    assert source.read(12) == b"/etc/passwd"
    assert not (tmp_path / "00091.png").exists()


def test_zip_with_backslashes_and_a_repeated_name(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t\\00001.png", b"one")
        archive.writestr("t\\00000.png", b"zero")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("t\\00000.png", b"zero, again")

    source = find_source(path, 8)
    assert source.ids == [0, 1]
    assert source.read(0) == b"zero, again"


def test_links_are_followed_and_pipes_not_read(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (root / "thumbnails").symlink_to(write_folder(tmp_path / "elsewhere"))
    os.mkfifo(root / "00077.png")
    (root / "00078.png").symlink_to(tmp_path / "gone.png")

    # The link that leads nowhere becomes a bad image.
    source = find_source(root, 8)
    assert source.ids == [*NUMBERS, 78]
    assert str(source.read(10)) == "cannot be read (No such file or directory)"

    # A link that leads back up shows every image again, but not without end.
    (root / "back").symlink_to(root)
    with pytest.raises(UserError, match="images have the number"):
        find_source(root, 8, numbered=True)


def test_the_folder_by_which_another_process_tries_to_write_may_vanish(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    (path / ".packed-probe").mkdir()
    scandir = os.scandir

    def vanishing(folder):
        if str(folder).endswith(".packed-probe"):
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert find_source(path, 8).ids == NUMBERS


def test_npz(tmp_path):
    images = np.zeros((5, 8, 8, 3), np.uint8)

    # The array of images may have any name, and others may lie beside it.
    np.savez(tmp_path / "a.npz", images, np.arange(5))
    np.savez_compressed(tmp_path / "b.npz", images=images)
    for name in ("a.npz", "b.npz"):
        assert find_source(tmp_path / name, 8, numbered=True).ids == [0, 1, 2, 3, 4]

    np.savez(tmp_path / "two.npz", images, images)
    np.savez(tmp_path / "float.npz", images.astype(np.float32))
    np.savez(tmp_path / "pickle.npz", np.array([{}], dtype=object))
    for name in ("two.npz", "float.npz", "pickle.npz"):
        with pytest.raises(UserError, match="exactly one"):
            find_source(tmp_path / name, 8)


def test_a_tar(tmp_path):
    path = tmp_path / "FFHQ.tar"
    # A WebDataset has files of other kinds beside each image.
    more = {"teaser.png": PICTURE, "00003.json": b"{}", "00003.cls": b"1"}
    with tarfile.open(path, "w") as archive:
        # Of two members with the same name, the last one counts.
        archive.add(write_folder(tmp_path / "other", 255 - IMAGES[:1]), "set")
        archive.add(write_folder(tmp_path / "set", more=more), "set")

    assert find_ffhq(tmp_path) == path
    assert find_source(path, 8, numbered=True).ids == NUMBERS
    path.with_name("set").rename(tmp_path / "elsewhere")
    assert np.array_equal(load(path).images[:10], IMAGES)

    # Each kind of damage shows when the tar is opened: a cut in a member, in a header and between
    # two members, and a changed byte of a header.
    intact = path.read_bytes()
    with tarfile.open(path) as archive:
        start = archive.getmembers()[5].offset
    changed = bytearray(intact)
    changed[start + 3] ^= 1
    for damaged in (intact[: start + 600], intact[: start + 100], intact[:start], changed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            find_source(path, 8)


@posix
def test_an_unknown_home_folder_is_said_in_a_sentence():
    with pytest.raises(UserError, match="~no-such-user/faces: this home folder is unknown"):
        find_source("~no-such-user/faces", 8)


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "a.rar").write_bytes(b"")
    write_zip(tmp_path / "text.zip", [], more={"readme.txt": b"no image"})
    write_zip(tmp_path / "broken.npz", [], more={"arr_0.npy": b"no array"})

    for name, message in (
        ("missing", "does not exist"),
        ("empty", "no image"),
        ("a.zip", r"cannot be read \(File is not a zip file\)"),
        ("a.rar", "neither a folder"),
        ("text.zip", "no image"),
        ("broken.npz", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find_source(tmp_path / name, 8)
        assert str(tmp_path / name) in str(error.value)
