"""data/packed.py: prepared once, and again only when something changed."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from data import packed
from data.decode import BadImage, fit_square
from data.sources import find_source
from functions.support.errors import UserError
from tests.data.packing import (
    IMAGES,
    encoded,
    forbid_decoding,
    load,
    packed_files,
    write_folder,
    write_npz,
    write_zip,
)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_folder, "set"),
        (write_zip, "set.zip"),
        (write_npz, "set.npz"),
    ],
)
def test_the_pack_holds_the_pixels_and_is_made_once(tmp_path, monkeypatch, write, name):
    path = write(tmp_path / name)
    pack = load(path)

    assert_array_equal(pack.images, IMAGES)
    assert isinstance(pack.images, np.memmap)
    assert not pack.images.flags.writeable
    assert pack.ids == list(range(10))

    # The file holds the pixels and nothing else.
    assert pack.path.read_bytes() == IMAGES.tobytes()
    assert packed_files(pack.path.parent) == [
        f"{name}-8px.packed",
        f"{name}-8px.packed.json",
        f"{name}-8px.packed.lock",
    ]

    forbid_decoding(monkeypatch)
    assert_array_equal(load(path).images, IMAGES)


def test_the_hash_is_that_of_the_pixels_and_not_of_their_files(tmp_path):
    pack = load(write_folder(tmp_path / "set"))
    assert pack.pixels_hash == hashlib.sha256(pack.path.read_bytes()).hexdigest()[:16]
    archive = load(write_zip(tmp_path / "set.zip"))
    assert (archive.ids, archive.pixels_hash) == (pack.ids, pack.pixels_hash)

    others = load(write_folder(tmp_path / "others", 255 - IMAGES))
    assert others.ids == pack.ids
    assert others.pixels_hash != pack.pixels_hash


def test_a_pack_of_an_earlier_version_without_a_hash_is_made_anew(tmp_path):
    path = write_folder(tmp_path / "set")
    pack = load(path)
    record_path = Path(f"{pack.path}.json")
    record = json.loads(record_path.read_text())
    del record["pixels_hash"]
    record_path.write_text(json.dumps(record))

    assert load(path).pixels_hash == pack.pixels_hash


def test_sizes_lie_side_by_side_and_move_with_their_folder(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    load(path)
    load(path, 4)
    small = [fit_square(image, 4) for image in IMAGES]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = path.rename(elsewhere / "set")

    forbid_decoding(monkeypatch)
    assert_array_equal(load(path).images, IMAGES)
    assert_array_equal(load(path, 4).images, small)


def test_what_changed_is_made_anew_in_the_same_place(tmp_path):
    path = write_folder(tmp_path / "set")
    before = load(path)
    files = packed_files(path)

    # A file is another one as soon as its time of modification is another.
    changed = IMAGES.copy()
    changed[3] = 255 - changed[3]
    Image.fromarray(changed[3]).save(path / "00003.png")
    os.utime(path / "00003.png", ns=(1, 1))
    assert_array_equal(load(path).images, changed)

    # Who has the old pack open keeps it.
    assert_array_equal(before.images, IMAGES)

    # An image is added and taken away again.
    Image.fromarray(IMAGES[0]).save(path / "00010.png")
    assert len(load(path).images) == 11
    (path / "00010.png").unlink()
    assert len(load(path).images) == 10

    assert packed_files(path) == files


def test_a_zip_is_known_by_its_content_and_not_by_its_time(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip")
    load(path)
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        load(path)

    write_zip(path, 255 - IMAGES)
    assert_array_equal(load(path).images, 255 - IMAGES)


def test_a_pack_of_another_format_is_not_read(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip")
    pack = load(path)
    monkeypatch.setattr(packed, "FORMAT_VERSION", packed.FORMAT_VERSION + 1)
    key = packed.pack_key(find_source(path, 8), 8)
    assert packed.read_pack(pack.path, key, (8, 8, 3)) is None


@pytest.mark.parametrize("ending", ["", ".json"])
@pytest.mark.parametrize(
    "left",
    [
        # The file is gone.
        None,
        # The file is cut short.
        b"{",
        # The file is a json of another form.
        b"[]",
        # The file is longer than it should be.
        bytes(9999),
    ],
)
def test_a_damaged_pack_is_made_anew(tmp_path, ending, left):
    path = write_folder(tmp_path / "set")
    pack_path = load(path).path
    damaged = Path(f"{pack_path}{ending}")
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(left)

    assert_array_equal(load(path).images, IMAGES)


def test_many_threads_keep_the_order_and_name_the_bad(tmp_path):
    images = np.concatenate([IMAGES] * 10)
    folder = write_folder(tmp_path / "set", images)
    (folder / "00007.png").write_bytes(b"no image")
    archive = shutil.make_archive(folder, "zip", folder)

    for path in (folder, Path(archive)):
        pack = load(path, max_bad_images=1)
        assert_array_equal(pack.images, np.delete(images, 7, axis=0))
        assert pack.ids == [number for number in range(100) if number != 7]
        assert pack.bad_images[0][0] == "00007.png"


def test_a_source_is_read_in_order_by_one_thread_and_images_without_files_have_names(tmp_path):
    source = find_source(write_npz(tmp_path / "set.npz"), 8)
    calls = []

    def read(i, read=source.read):
        calls.append((i, get_ident()))
        pixels = read(i)
        return BadImage("spoilt") if i == 7 else pixels

    source.read = read
    pack = packed.open_packed(source, 8, max_bad_images=1)
    assert pack.bad_images == [["image 7", "spoilt"]]
    assert calls == [(i, get_ident()) for i in range(10)]


def test_bad_images_are_listed_and_counted(tmp_path, capsys, monkeypatch):
    # Of three images one is cut short, one is a web page, and one is a link to nothing.
    path = write_folder(tmp_path / "set")
    whole = (path / "00002.png").read_bytes()
    (path / "00002.png").write_bytes(whole[:100])
    (path / "00005.png").unlink()
    (path / "00005.jpg").write_text("<html>quota exceeded</html>")
    (path / "00011.png").symlink_to("nowhere.png")

    with pytest.raises(UserError, match=r"3 unusable.*2 allowed.*00002\.png"):
        load(path, max_bad_images=2)
    printed = capsys.readouterr().out
    assert "8 images" in printed
    assert "3 left out" in printed
    assert "00002.png: broken" in printed
    assert "00005.jpg: not a PNG" in printed
    assert "00011.png: cannot be" in printed

    record = json.loads((path / "set-8px.packed.json").read_text())
    names = [name for name, reason in record["bad_images"]]
    assert names == ["00002.png", "00005.jpg", "00011.png"]

    # No second decoding is needed to allow them. The limit holds for a pack that is there, too.
    forbid_decoding(monkeypatch)
    assert load(path, max_bad_images=3).ids == [0, 1, 3, 4, 6, 7, 8, 9]
    with pytest.raises(UserError, match="3 unusable"):
        load(path)


def test_what_was_enlarged_and_cropped_is_counted(tmp_path, capsys):
    wide = encoded(Image.new("RGB", (9, 8)))
    small = encoded(Image.new("RGB", (4, 4)))
    path = write_folder(tmp_path / "set", more={"00010.png": wide, "00011.png": small})

    load(path)

    printed = capsys.readouterr().out
    assert "1 not square" in printed
    assert "1 smaller than 8 px" in printed


def test_a_set_without_one_good_image_is_an_error(tmp_path):
    path = write_folder(tmp_path / "set", [], more={"a.png": b""})
    with pytest.raises(UserError, match=r"none of.*a\.png.*empty file"):
        load(path, max_bad_images=5)
