"""data/packed.py: prepared once, and again only when something changed."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import packed, sources
from data.packed import open_packed
from data.sources import find_source
from functions.support.errors import UserError
from tests.data.packing import IMAGES, forbid_decoding, load, packed_files, write_folder, write_zip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_the_pack_holds_the_pixels_and_is_made_once(tmp_path, monkeypatch, kind):
    if kind == "npz":
        path = tmp_path / "set.npz"
        np.savez_compressed(path, IMAGES)
    else:
        path = write_folder(tmp_path / "set") if kind == "folder" else write_zip(tmp_path / "set.zip")
    pack = load(path)
    np.testing.assert_array_equal(pack.images, IMAGES)
    assert isinstance(pack.images, np.memmap) and not pack.images.flags.writeable
    assert pack.ids == list(range(10))
    assert pack.path.read_bytes() == IMAGES.tobytes()
    assert packed_files(pack.path.parent) == [f"{path.name}-8px.packed" + ending for ending in ("", ".json", ".lock")]
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_sizes_lie_side_by_side(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    load(path), load(path, 4)
    assert load(path, 4).images.shape == (10, 4, 4, 3)
    forbid_decoding(monkeypatch)
    load(path), load(path, 4)


def test_a_moved_folder_keeps_its_pack(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    load(path)
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / "set")
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(tmp_path / "elsewhere" / "set").images, IMAGES)


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


def test_a_zip_is_known_by_its_content_not_its_time(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip")
    load(path)
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        load(path)
    write_zip(path, 255 - IMAGES)
    np.testing.assert_array_equal(load(path).images, 255 - IMAGES)


def test_another_format_version_is_made_anew(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    key = packed.pack_key(find_source(path, 8), 8)
    monkeypatch.setattr(packed, "FORMAT_VERSION", packed.FORMAT_VERSION + 1)
    assert packed.pack_key(find_source(path, 8), 8) != key


@pytest.mark.parametrize(
    "damage",
    [
        lambda pack: pack.write_bytes(pack.read_bytes()[:-1]),
        lambda pack: pack.unlink(),
        lambda pack: pack.with_name(pack.name + ".json").write_text("{"),
        lambda pack: pack.with_name(pack.name + ".json").write_text("[]"),
        lambda pack: pack.with_name(pack.name + ".json").unlink(),
    ],
)
def test_a_damaged_pack_is_made_anew(tmp_path, damage):
    path = write_folder(tmp_path / "set")
    damage(load(path).path)
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
    (path / "00005.jpg").write_text("<html>quota exceeded</html>")
    (path / "00005.png").unlink()
    source = find_source(path, 8)
    with pytest.raises(UserError, match=r"2 unusable.*1 allowed.*00002\.png"):
        open_packed(source, 8, max_bad_images=1)
    printed = capsys.readouterr().out
    assert "8 images" in printed and "2 left out" in printed
    assert "00002.png: broken" in printed and "00005.jpg: not a PNG" in printed
    names = [name for name, _ in json.loads((path / "set-8px.packed.json").read_text())["bad_images"]]
    assert names == ["00002.png", "00005.jpg"]
    # Allowing them needs no second decoding, and the limit holds for a pack that is there already.
    forbid_decoding(monkeypatch)
    assert load(path, max_bad_images=2).ids == [0, 1, 3, 4, 6, 7, 8, 9]
    with pytest.raises(UserError, match="2 unusable"):
        load(path)


def test_what_was_enlarged_and_cropped_is_counted(tmp_path, capsys):
    path = write_folder(tmp_path / "set")
    Image.new("RGB", (9, 8)).save(path / "00010.png")
    Image.new("RGB", (4, 4)).save(path / "00011.png")
    open_packed(find_source(path, 8), 8)
    printed = capsys.readouterr().out
    assert "1 not square" in printed and "1 smaller than 8 px" in printed


def test_a_set_without_one_good_image_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"not one.*a\.png.*empty file"):
        load(tmp_path / "set", max_bad_images=5)


def test_what_cannot_be_read_is_a_bad_image(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    (path / "00011.png").symlink_to("nowhere.png")
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    (path / "00012.png").write_bytes(bytes(1001))
    assert [name for name, _ in load(path, max_bad_images=2).bad_images] == ["00011.png", "00012.png"]

    archive = write_zip(tmp_path / "set.zip")
    data = bytearray(archive.read_bytes())
    data[100] ^= 1  # inside the first member's pixels: its checksum no longer fits
    archive.write_bytes(bytes(data))
    bad = load(archive, max_bad_images=1).bad_images
    assert bad[0][0] == "00000.png" and "CRC" in bad[0][1]


def test_quiet_prints_nothing(tmp_path, capsys):
    load(write_folder(tmp_path / "set"))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_cut_npz_is_an_error(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + IMAGES[:5].tobytes())
    with pytest.raises(UserError, match="not as large as it says"):
        load(tmp_path / "a.npz")
