"""data/packed.py: prepared once, and again only when something changed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import packed
from data.decode import fit_square
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
    ("write", "name"), [(write_folder, "set"), (write_zip, "set.zip"), (write_npz, "set.npz")]
)
def test_the_pack_holds_the_pixels_and_is_made_once(tmp_path, monkeypatch, write, name):
    path = write(tmp_path / name)
    pack = load(path)
    np.testing.assert_array_equal(pack.images, IMAGES)
    assert isinstance(pack.images, np.memmap) and not pack.images.flags.writeable
    assert pack.ids == list(range(10))
    assert pack.path.read_bytes() == IMAGES.tobytes()
    assert packed_files(pack.path.parent) == [
        f"{name}-8px.packed" + ending for ending in ("", ".json", ".lock")
    ]
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_sizes_lie_side_by_side_and_move_with_their_folder(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    load(path)
    load(path, 4)
    (tmp_path / "elsewhere").mkdir()
    path = path.rename(tmp_path / "elsewhere" / "set")
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(path).images, IMAGES)
    np.testing.assert_array_equal(load(path, 4).images, [fit_square(image, 4) for image in IMAGES])


def test_what_changed_is_made_anew_in_the_same_place(tmp_path):
    path = write_folder(tmp_path / "set")
    before = load(path)
    changed = IMAGES.copy()
    changed[3] = 255 - changed[3]
    Image.fromarray(changed[3]).save(path / "00003.png")
    os.utime(path / "00003.png", ns=(1, 1))  # as little as another time of modification is a change
    files = packed_files(path)
    np.testing.assert_array_equal(load(path).images, changed)
    np.testing.assert_array_equal(before.images, IMAGES)  # who has the old one open keeps it
    Image.fromarray(IMAGES[0]).save(path / "00010.png")
    assert load(path).images.shape[0] == 11
    (path / "00010.png").unlink()
    assert load(path).images.shape[0] == 10
    assert packed_files(path) == files


def test_a_zip_is_known_by_its_content_and_the_format_not_by_its_time(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip")
    load(path)
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        load(path)
    write_zip(path, 255 - IMAGES)
    pack = load(path)
    np.testing.assert_array_equal(pack.images, 255 - IMAGES)
    monkeypatch.setattr(packed, "FORMAT_VERSION", packed.FORMAT_VERSION + 1)
    assert packed.read_pack(pack.path, packed.pack_key(find_source(path, 8), 8), 8) is None


@pytest.mark.parametrize("ending", ["", ".json"])
@pytest.mark.parametrize("left", [None, b"{", b"[]", bytes(9999)])
def test_a_damaged_pack_is_made_anew(tmp_path, ending, left):
    path = write_folder(tmp_path / "set")
    damaged = Path(f"{load(path).path}{ending}")
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(left)
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_many_threads_keep_the_order_and_name_the_bad(tmp_path):
    images = np.concatenate([IMAGES] * 10)
    path = write_folder(tmp_path / "set", images)
    (path / "00007.png").write_bytes(b"no image")
    for root in (path, Path(shutil.make_archive(str(path), "zip", path))):
        pack = load(root, max_bad_images=1)
        np.testing.assert_array_equal(pack.images, np.delete(images, 7, axis=0))
        assert pack.ids == [number for number in range(100) if number != 7]
        assert pack.bad_images[0][0] == "00007.png"


def test_bad_images_are_listed_and_counted(tmp_path, capsys, monkeypatch):
    path = write_folder(tmp_path / "set")
    (path / "00002.png").write_bytes((path / "00002.png").read_bytes()[:100])
    (path / "00005.png").rename(path / "00005.jpg").write_text("<html>quota exceeded</html>")
    (path / "00011.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"3 unusable.*2 allowed.*00002\.png"):
        load(path, max_bad_images=2)
    printed = capsys.readouterr().out
    assert "8 images" in printed and "3 left out" in printed
    assert (
        "00002.png: broken" in printed
        and "00005.jpg: not a PNG" in printed
        and "00011.png: cannot be" in printed
    )
    names = [
        name for name, _ in json.loads((path / "set-8px.packed.json").read_text())["bad_images"]
    ]
    assert names == ["00002.png", "00005.jpg", "00011.png"]
    # Allowing them needs no second decoding, and the limit holds for a pack that is there already.
    forbid_decoding(monkeypatch)
    assert load(path, max_bad_images=3).ids == [0, 1, 3, 4, 6, 7, 8, 9]
    with pytest.raises(UserError, match="3 unusable"):
        load(path)


def test_what_was_enlarged_and_cropped_is_counted(tmp_path, capsys):
    wide, small = encoded(Image.new("RGB", (9, 8))), encoded(Image.new("RGB", (4, 4)))
    path = write_folder(tmp_path / "set", more={"00010.png": wide, "00011.png": small})
    load(path)
    printed = capsys.readouterr().out
    assert "1 not square" in printed and "1 smaller than 8 px" in printed


def test_a_set_without_one_good_image_is_an_error(tmp_path):
    path = write_folder(tmp_path / "set", [], more={"a.png": b""})
    with pytest.raises(UserError, match=r"not one.*a\.png.*empty file"):
        load(path, max_bad_images=5)
