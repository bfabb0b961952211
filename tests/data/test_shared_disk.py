"""What can go wrong around a packed file: read-only or full disks, killed and competing processes."""

import errno
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data import packed
from data.decode import fit_square
from functions.support.errors import UserError
from tests.conftest import posix
from tests.data.packing import IMAGES, forbid_decoding, load, packed_files, write_folder, write_zip
from tests.forked import Program, wait_until


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_read_only_data_goes_to_the_cache_and_is_found_there(tmp_path, monkeypatch):
    one, two = (
        write_folder(tmp_path / "1" / "set"),
        write_folder(tmp_path / "2" / "set", 255 - IMAGES),
    )
    writable = packed.is_writable
    monkeypatch.setattr(
        packed, "is_writable", lambda folder: folder not in (one, two) and writable(folder)
    )
    for path, expected in ((one, IMAGES), (two, 255 - IMAGES)):
        pack = load(path)
        np.testing.assert_array_equal(pack.images, expected)
        assert pack.path.parent == tmp_path / "cache" / "ddpm-packed-images"
        assert not packed_files(path)
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(one).images, IMAGES)


def test_whether_a_folder_can_be_written_is_tried(tmp_path):
    assert packed.is_writable(tmp_path) and not list(tmp_path.iterdir())
    if Path("/proc/self").exists():  # read-only even for root
        assert not packed.is_writable(Path("/proc/self"))


@pytest.mark.parametrize("synced_before", [0, 2], ids=["at the images", "at their record"])
def test_a_disk_that_runs_full_leaves_nothing_wrong_behind(tmp_path, monkeypatch, synced_before):
    path, synced = write_zip(tmp_path / "set.zip"), []
    load(path)
    write_zip(path, 255 - IMAGES)

    def full(file):
        synced.append(file)
        if len(synced) > synced_before:
            raise OSError(errno.ENOSPC, "No space left on device")

    message = r"0\.0 MB of images, cannot be written \(No space left on device\)\. Make room"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(os, "fsync", full)
        load(path)
    assert packed_files(tmp_path) == ["set.zip-8px.packed", "set.zip-8px.packed.lock"]
    # As it was: what is left of its record must not be taken for that of the other images
    write_zip(path)
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_nowhere_to_write_is_said(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(packed, "is_writable", lambda folder: False)
    with pytest.raises(
        UserError, match=r"ddpm-packed-images/.* cannot be written \(Not a directory\)"
    ):
        load(path)


def test_a_disk_without_locks_leaves_the_pack_to_the_cache(tmp_path, monkeypatch):
    path, lock = write_folder(tmp_path / "set"), packed.FileLock

    def no_locks(place):
        if str(place).startswith(str(path)):
            raise OSError(errno.ENOLCK, "No locks available")
        return lock(place)

    monkeypatch.setattr(packed, "FileLock", no_locks)
    before = sorted(path.iterdir())
    assert load(path).path.is_relative_to(tmp_path / "cache")
    assert sorted(path.iterdir()) == before


def build(path, go):
    """What a process does: prepare a folder, but go no further than the first image until a file is there."""

    def slow_fit(rgb, image_size):
        wait_until(go.exists, lambda: True)
        return fit_square(rgb, image_size)

    packed.fit_square = slow_fit
    print("sum", load(path).images.sum(dtype=int))


@pytest.mark.slow
@posix
def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path):
    path, go = write_folder(tmp_path / "set"), tmp_path / "go"
    programs = [Program(tmp_path / name, act=partial(build, path, go)) for name in ("1", "2")]
    waits = lambda: any("waiting for it" in program.printed for program in programs)
    wait_until(waits, lambda: all(program.is_alive() for program in programs))
    go.touch()
    assert [program.wait() for program in programs] == [0, 0]
    printed = [program.printed for program in programs]
    assert all(f"sum {IMAGES.sum()}" in text for text in printed)
    assert sum("10 images at 8x8" in text for text in printed) == 1  # only who prepares reports
    assert sum("waiting for it" in text for text in printed) == 1 and not list(path.glob(".*.tmp"))


@pytest.mark.slow
@posix
def test_after_a_kill_it_starts_again_cleanly(tmp_path):
    path = write_folder(tmp_path / "set")
    program = Program(tmp_path / "printed", act=partial(build, path, tmp_path / "go"))
    wait_until(lambda: list(path.glob(".*.packed.*.tmp")), program.is_alive)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert packed_files(path) == [f".set-8px.packed.{program.pid}.tmp", "set-8px.packed.lock"]
    np.testing.assert_array_equal(load(path).images, IMAGES)
    assert packed_files(path) == ["set-8px.packed" + ending for ending in ("", ".json", ".lock")]
