"""What can go wrong around a packed file.

Disks are read-only or full; processes compete or are killed.
"""

import errno
import os
import signal
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from numpy.testing import assert_array_equal

from data import packed
from data.decode import fit_square
from functions.support.errors import UserError
from tests.conftest import posix
from tests.data.packing import IMAGES, forbid_decoding, load, packed_files, write_folder, write_zip
from tests.forked import Program, wait_until


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the tests out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_read_only_data_goes_to_the_cache_and_is_found_there(tmp_path, monkeypatch):
    # Two sets of the same name lie on read-only disks.
    first = write_folder(tmp_path / "1" / "set")
    second = write_folder(tmp_path / "2" / "set", 255 - IMAGES)
    is_writable = packed.is_writable

    def is_writable_elsewhere(folder):
        return folder not in (first, second) and is_writable(folder)

    monkeypatch.setattr(packed, "is_writable", is_writable_elsewhere)

    for path, expected in ((first, IMAGES), (second, 255 - IMAGES)):
        pack = load(path)
        assert_array_equal(pack.images, expected)
        assert pack.path.parent == tmp_path / "cache" / "ddpm-packed-images"
        assert not packed_files(path)

    forbid_decoding(monkeypatch)
    assert_array_equal(load(first).images, IMAGES)


@posix
def test_a_user_without_a_home_folder_has_a_cache(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    monkeypatch.setattr(packed, "is_writable", lambda folder: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError))

    assert load(path).path.is_relative_to(tmp_path / f"cache-{os.getuid()}")


def test_whether_a_folder_can_be_written_is_tried(tmp_path):
    assert packed.is_writable(tmp_path)
    assert not list(tmp_path.iterdir())

    # This folder is read-only even for root.
    if Path("/proc/self").exists():
        assert not packed.is_writable(Path("/proc/self"))


@pytest.mark.parametrize("synced_before", [0, 2], ids=["at the images", "at their record"])
def test_a_disk_that_runs_full_leaves_nothing_wrong_behind(tmp_path, monkeypatch, synced_before):
    path = write_zip(tmp_path / "set.zip")
    load(path)
    write_zip(path, 255 - IMAGES)

    # Every write ends with an fsync, and the disk is full after so many of them.
    synced = []

    def full(file):
        synced.append(file)
        if len(synced) > synced_before:
            raise OSError(errno.ENOSPC, "No space left on device")

    message = r"0\.0 MB of images, cannot be written \(No space left on device\)\. Make room"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(os, "fsync", full)
        load(path)
    assert packed_files(tmp_path) == ["set.zip-8px.packed", "set.zip-8px.packed.lock"]

    # The zip is what it was at first. Its old record must not be taken for that of the new images.
    write_zip(path)
    assert_array_equal(load(path).images, IMAGES)


def test_nowhere_to_write_is_said(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    monkeypatch.setattr(packed, "is_writable", lambda folder: False)

    # A file lies where the cache should be.
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))

    message = r"ddpm-packed-images/.* cannot be written \(Not a directory\).* set XDG_CACHE_HOME"
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_disk_without_locks_leaves_the_pack_to_the_cache(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    before = sorted(path.iterdir())
    lock = packed.FileLock

    def no_locks(place):
        if str(place).startswith(str(path)):
            raise OSError(errno.ENOLCK, "No locks available")
        return lock(place)

    monkeypatch.setattr(packed, "FileLock", no_locks)

    assert load(path).path.is_relative_to(tmp_path / "cache")
    assert sorted(path.iterdir()) == before


def build(path, go):
    """Prepare a folder, but wait at the first image until the file `go` is there."""

    def slow_fit(rgb, image_size):
        wait_until(go.exists, lambda: True)
        return fit_square(rgb, image_size)

    # The process is a fork, so this patch ends with it.
    packed.fit_square = slow_fit
    print("sum", load(path).images.sum(dtype=int))


@pytest.mark.slow
@posix
def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path):
    path = write_folder(tmp_path / "set")
    go = tmp_path / "go"
    programs = [Program(tmp_path / name, act=partial(build, path, go)) for name in ("1", "2")]

    def one_waits():
        return any("waiting for it" in program.printed for program in programs)

    # Neither goes on before they have met.
    wait_until(one_waits, lambda: all(program.is_alive() for program in programs))
    go.touch()
    for program in programs:
        assert program.wait() == 0
        assert f"sum {IMAGES.sum()}" in program.printed

    # Only the one that prepares reports what there is.
    printed = "".join(program.printed for program in programs)
    assert printed.count("10 images at 8x8") == 1
    assert printed.count("waiting for it") == 1
    assert not list(path.glob(".*.tmp"))


@pytest.mark.slow
@posix
def test_after_a_kill_it_starts_again_cleanly(tmp_path):
    path = write_folder(tmp_path / "set")

    # The process is killed when it has begun to write.
    program = Program(tmp_path / "printed", act=partial(build, path, tmp_path / "go"))
    wait_until(lambda: list(path.glob(".*.packed.*.tmp")), program.is_alive)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert packed_files(path) == [f".set-8px.packed.{program.pid}.tmp", "set-8px.packed.lock"]

    assert_array_equal(load(path).images, IMAGES)
    assert packed_files(path) == ["set-8px.packed", "set-8px.packed.json", "set-8px.packed.lock"]
