"""data/packed.py: prepared once, again when something changed, and whatever the disk is like."""

import errno
import hashlib
import os
import signal
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from data import decode, packed
from data.decode import fit_square
from functions.support.errors import UserError
from tests.conftest import posix, refused
from tests.data.packing import (
    IMAGES,
    encoded,
    forbid_decoding,
    load,
    packed_files,
    random_pixels,
    write_folder,
    write_zip,
)
from tests.forked import Program, wait_until


@pytest.fixture
def path(tmp_path):
    """Return a folder of the ten images."""
    return write_folder(tmp_path / "set")


@pytest.mark.parametrize("write, name", [(write_folder, "set"), (write_zip, "set.zip")])
def test_the_pack_holds_the_pixels_and_is_made_once(tmp_path, monkeypatch, write, name):
    before = tmp_path / "before"
    before.mkdir()
    path = write(before / name)
    pack = load(path)
    assert not pack.images.flags.writeable

    # NumPy reads the file.
    file = Path(pack.images.filename)
    assert_array_equal(np.load(file), IMAGES)
    assert pack.pixels_hash == hashlib.sha256(IMAGES).hexdigest()[:16]

    # Another size lies beside it. Both move with a folder or an archive. A zip is known by its
    # content and not by its time.
    assert_array_equal(load(path, 4).images, [fit_square(image, 4) for image in IMAGES])
    moved = before.rename(tmp_path / "moved") / name
    os.utime(moved, ns=(1, 1))
    forbid_decoding(monkeypatch)
    pack = load(moved)
    assert_array_equal(pack.images, IMAGES)
    # It was hashed when it was written, and is not hashed again at each start.
    np.save(moved.parent / pack.name if moved.suffix else moved / pack.name, 0 * IMAGES)
    assert not load(moved).images.any()


def test_what_changed_is_made_anew_in_the_same_place(path):
    before = load(path)
    files = packed_files(path)

    # A file is another one as soon as its time of modification is another.
    write_folder(path, 255 - IMAGES[:1])
    os.utime(path / "00000.png", ns=(1, 1))
    assert_array_equal(load(path).images, [255 - IMAGES[0], *IMAGES[1:]])

    # Who has the old pack open keeps it.
    assert_array_equal(before.images, IMAGES)

    (path / "00009.png").unlink()
    assert len(load(path).images) == 9
    assert packed_files(path) == files


@pytest.mark.parametrize("ending", ["", ".json"])
def test_a_pack_that_is_not_whole_is_made_anew(path, ending):
    damaged = Path(f"{load(path).images.filename}{ending}")
    whole = damaged.read_bytes()
    for content in (None, b"", b"[]", b"{}", whole[:-1]):
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        assert_array_equal(load(path).images, IMAGES)
        assert damaged.read_bytes() == whole


def test_a_pack_is_final_and_says_how_its_bad_images_are_read_again(path, monkeypatch):
    """Of the images one is cut short, one is a web page, and one is for another Pillow."""
    (path / "00010.webp").write_bytes(encoded(IMAGES[0], "WEBP"))
    (path / "00002.png").write_bytes((path / "00002.png").read_bytes()[:100])
    (path / "00005.png").write_text("<html>quota exceeded</html>")
    again = f"eleting {path / 'set-8px.packed.npy'} reads "
    with monkeypatch.context() as patch:
        patch.setattr(decode, "FORMATS", ("PNG",))
        named = r"00002\.png \(cannot be .*, 00005\.png \(not a .*, 00010\.webp \(not a .*"
        with refused(rf"3 of 11 images are unusable, 2 allowed: {named}images 3\. D{again}them"):
            load(path, max_bad_images=2)

        # Nothing is decoded again to allow them, or to refuse them.
        forbid_decoding(patch)
        pack = load(path, max_bad_images=3)
        assert f"8 images at 8x8, 3 left out; d{again}those left out" in pack.summary
        assert pack.ids == [0, 1, 3, 4, 6, 7, 8, 9]
        assert_array_equal(pack.images, IMAGES[pack.ids])
        with refused("3 of 11"):
            load(path)
    Path(pack.images.filename).unlink()
    assert load(path, max_bad_images=2).ids == [*pack.ids, 10]


def test_other_files_and_what_is_smaller_than_the_size_are_counted(tmp_path, capsys, monkeypatch):
    images = [random_pixels(1, 1, 3), random_pixels(300, 7, 3), random_pixels(9, 300, 3)]
    path = write_folder(tmp_path / "set", images, more={"a.TIF": b"", ".hidden.png": b""})
    start = "set: 3 images at 8x8, 0 left out, 2 smaller than that"
    assert load(path).summary == f"{start}; 1 other files"
    assert capsys.readouterr().out == f"{start}\n"

    # A pack that was made before says the same, but of the files of now.
    forbid_decoding(monkeypatch)
    (path / "b").touch()
    assert load(path).summary == f"{start}; 2 other files"


# The errors of their parsers are of three classes.
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_one_bad_image(tmp_path, method):
    path = write_zip(tmp_path / "set.zip", compression=method)
    offset = zipfile.ZipFile(path).getinfo("00005.png").header_offset
    with open(path, "r+b") as file:
        # The headers of the member and of LZMA have 48 bytes.
        file.seek(offset + 60)
        file.write(bytes(10))
    with refused(r"set.zip: 1 of 10 .* 00005.png \(cannot be read \(\w+: "):
        load(path)
    assert load(path, max_bad_images=1).ids == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.EIO, "the disk"), OSError, r"the disk: '.*set.zip: 0000\d.png'"),
        (MemoryError("no memory"), MemoryError, "no memory"),
        # A damaged file may name a place that no file has.
        (OSError(errno.EINVAL, "a place"), UserError, "10 of 10 images .*OSError: .* a place"),
    ],
)
def test_an_error_of_disk_or_memory_is_no_bad_image(error, kind, message, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip")
    monkeypatch.setattr(zipfile.ZipFile, "read", Mock(side_effect=error))
    with refused(message, kind):
        load(path)


def test_a_set_without_one_good_image_is_an_error(tmp_path):
    path = write_folder(tmp_path / "set", [], more={"\x1b.png": b""})
    # A name must not control the terminal.
    with refused(r"1 of 1 images are unusable, 9 allowed: \\x1b.png \(empty file\)"):
        load(path, max_bad_images=9)


def test_read_only_data_go_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Two sets have the same name.
    paths = [write_folder(tmp_path / "data" / name / "set") for name in "12"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in paths:
        pack = load(path)
        assert Path(pack.images.filename).is_relative_to(tmp_path / "cache")
        assert not packed_files(path)
    forbid_decoding(monkeypatch)
    assert_array_equal(load(paths[0]).images, IMAGES)


@pytest.mark.parametrize("synced_before", [0, 2])
def test_a_disk_that_runs_full_leaves_nothing_wrong_behind(tmp_path, monkeypatch, synced_before):
    path = tmp_path / "set.zip"
    load(write_zip(path))
    write_zip(path, 255 - IMAGES)
    # The images end with an fsync, and so do their folder and their record. There the disk is full.
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, refused(f"{full.strerror}: '.*set.zip-8px", OSError):
        patch.setattr(os, "fsync", Mock(side_effect=[None] * synced_before + [full]))
        load(path)
    # Half a pack would keep the disk full.
    assert packed_files(tmp_path) == ["set.zip-8px.packed.npy"]

    # The zip is what it was at first. Its old record must not be taken for that of the new images.
    write_zip(path)
    assert_array_equal(load(path).images, IMAGES)


def build(path, go):
    """Prepare a folder, but wait at the first image until the file `go` is there."""

    def slow_fit(rgb, image_size):
        print("decoded", flush=True)
        wait_until(go.exists, lambda: True)
        return fit_square(rgb, image_size)

    # The process is a fork, so this patch ends with it.
    packed.fit_square = slow_fit
    print("sum", load(path).images.sum(dtype=int))


@pytest.mark.slow
@posix
def test_a_kill_leaves_no_pack_and_of_two_processes_that_prepare_one_wins(path, tmp_path):
    go = tmp_path / "go"

    # This process is killed when it has begun to write.
    killed = Program(tmp_path / "printed", act=partial(build, path, go))
    wait_until(lambda: list(path.glob(".*.packed.npy.*")), killed.is_alive)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert all(name.endswith(".tmp") for name in packed_files(path))

    programs = [Program(tmp_path / name, act=partial(build, path, go)) for name in ("1", "2")]
    wait_until(
        lambda: all("decoded" in program.printed for program in programs),
        lambda: all(program.is_alive() for program in programs),
    )
    go.touch()
    for program in programs:
        assert program.wait() == 0
        assert "10 images at 8x8" in program.printed
        assert f"sum {IMAGES.sum()}" in program.printed
    assert packed_files(path)[1:] == ["set-8px.packed.npy", "set-8px.packed.npy.json"]
    assert_array_equal(load(path).images, IMAGES)
