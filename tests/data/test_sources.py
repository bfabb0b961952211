"""data/sources.py: every layout of FFHQ is found and ordered alike; hostile and stray members are not."""

import os
import stat
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.sources import find_source
from functions.support.errors import UserError

COUNT = 12


def save(path, number=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (number, 0, 0)).save(path)


def build(root, pattern, numbers=range(COUNT), **options):
    # Backwards, so that neither a directory's nor an archive's own order is the right one.
    for number in reversed(numbers):
        save(root / pattern.format(folder=number - number % 5, number=number), number, **options)


def zipped(folder, path, *, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
        for name, data in extra:
            archive.writestr(name, data)
    return path


LAYOUTS = {
    "official tree": "thumbnails128x128/{folder:05d}/{number:05d}.png",
    "flat": "thumbnails128x128/{number:05d}.png",
    "bare": "{number:05d}.png",
    "jpeg": "resized/{number:05d}.jpg",
    "upper case": "{number:05d}.PNG",
    "webp": "{number:05d}.webp",
    "large": "images1024x1024/{folder:05d}/{number:05d}.png",
    "dataset_tool": "{folder:05d}/img{number:08d}.png",
    "unpadded": "{number}.bmp",
}


@pytest.mark.parametrize("pattern", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_every_layout_is_numbered_alike(tmp_path, pattern, in_zip):
    root = tmp_path / "set"
    build(root, pattern)
    (root / "LICENSE.txt").write_text("stray")
    (root / "dataset.json").write_text("{}")
    save(root / "__MACOSX" / "._00003.png")
    save(root / "thumbnails128x128" / "._00004.png")
    source = find_source(zipped(root, tmp_path / "set.ZIP") if in_zip else root, 8)
    assert source.ids == list(range(COUNT))
    assert [m.name for m in source.members] == [pattern.format(folder=n - n % 5, number=n) for n in range(COUNT)]
    assert (
        vars(find_source(source.path, 8, numbered=True)).items()
        >= {"ids": source.ids, "members": source.members}.items()
    )


def test_other_names_are_sorted_and_kept_whole(tmp_path):
    for name in ("b/1.png", "a/1.png", "a/10.png", "a/2.png", "zoe.jpeg"):
        save(tmp_path / name)
    assert find_source(tmp_path, 8).ids == ["a/1.png", "a/10.png", "a/2.png", "b/1.png", "zoe.jpeg"]


def test_two_series_of_numbers_are_names(tmp_path):
    for name in ("cat_2.png", "cat_10.png", "dog_3.png"):
        save(tmp_path / name)
    assert find_source(tmp_path, 8).ids == ["cat_10.png", "cat_2.png", "dog_3.png"]


def test_of_two_copies_one_is_read(tmp_path):
    build(tmp_path, "thumbnails128x128/{number:05d}.png")
    build(tmp_path, "images1024x1024/{number:05d}.png")
    build(tmp_path, "in-the-wild-images/{number:05d}.png")
    for image_size, chosen in ((64, "thumbnails128x128"), (128, "thumbnails128x128"), (256, "images1024x1024")):
        source = find_source(tmp_path, image_size, numbered=True)
        assert {member.name.split("/")[0] for member in source.members} == {chosen}
        assert source.ids == list(range(COUNT))
        assert chosen in source.notes[0]


def test_one_number_twice_is_an_error_where_numbers_are_needed(tmp_path):
    build(tmp_path, "one/{number:05d}.png", range(2))
    build(tmp_path, "two/{number:05d}.png", range(2))
    assert len(find_source(tmp_path, 8).ids) == 4
    with pytest.raises(UserError, match=r"2 images have the number [01]\. Keep one copy"):
        find_source(tmp_path, 8, numbered=True)


def test_unnumbered_images_are_passed_over_where_numbers_are_needed(tmp_path):
    build(tmp_path, "{number:05d}.png")
    save(tmp_path / "ffhq-teaser.png")
    source = find_source(tmp_path, 8, numbered=True)
    assert source.ids == list(range(COUNT))
    assert "ffhq-teaser.png" in source.notes[0]


def test_names_of_zip_members_are_no_paths(tmp_path):
    """Nothing is extracted, so the worst that a name can do is to name an image."""
    build(tmp_path / "set", "{number:05d}.png")
    picture = (tmp_path / "set" / "00000.png").read_bytes()
    link = zipfile.ZipInfo("00098.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    odd = [("/etc/00090.png", picture), ("C:\\00093.png", picture), ("../00091.png", picture), (link, b"/etc/passwd")]
    source = find_source(zipped(tmp_path / "set", tmp_path / "set.zip", extra=odd), 8)
    assert source.ids == [*range(COUNT), 90, 93, 98]
    assert source.read(COUNT) == picture and source.read(COUNT + 2) == b"/etc/passwd"
    assert not (tmp_path / "00091.png").exists()


def test_zip_with_backslashes_and_a_repeated_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("t\\00001.png", b"one")
        archive.writestr("t\\00000.png", b"zero")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("t\\00000.png", b"zero, again")
    source = find_source(tmp_path / "a.zip", 8)
    assert source.ids == [0, 1]
    assert source.members[0].size == len(b"zero, again")


def test_links_are_followed_and_pipes_not_read(tmp_path):
    build(tmp_path / "elsewhere", "{number:05d}.png")
    root = tmp_path / "set"
    root.mkdir()
    (root / "thumbnails").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "00077.png")
    (root / "00078.png").symlink_to(tmp_path / "gone.png")
    source = find_source(root, 8)
    assert source.ids == [*range(COUNT), 78]
    assert str(source.read(COUNT)) == "cannot be read (No such file or directory)"


def test_a_link_that_leads_back_up_is_said_where_numbers_are_needed(tmp_path):
    build(tmp_path, "{number:05d}.png")
    (tmp_path / "back").symlink_to(tmp_path)
    with pytest.raises(UserError, match="images have the number"):
        find_source(tmp_path, 8, numbered=True)


def test_npz(tmp_path):
    images = np.zeros((5, 8, 8, 3), np.uint8)
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
    with zipfile.ZipFile(tmp_path / "broken.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"not an array")
    with pytest.raises(UserError, match="cannot be read"):
        find_source(tmp_path / "broken.npz", 8)


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "a.tar").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "no image")
    for name, message in (
        ("missing", "does not exist"),
        ("empty", "no image"),
        ("a.zip", r"cannot be read \(File is not a zip file\)"),
        ("a.tar", "neither a folder"),
        ("text.zip", "no image"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find_source(tmp_path / name, 8)
        assert str(tmp_path / name) in str(error.value)


@settings(deadline=None, max_examples=15)
@given(numbers=st.lists(st.integers(0, 99_999), unique=True, min_size=1, max_size=8), order=st.randoms())
def test_ids_do_not_depend_on_the_order_of_an_archive(tmp_path_factory, numbers, order):
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    order.shuffle(numbers)
    with zipfile.ZipFile(path, "w") as archive:
        for number in numbers:
            archive.writestr(f"{order.choice('xyz')}/{number:05d}.png", b"")
    assert find_source(path, 8).ids == sorted(numbers)
