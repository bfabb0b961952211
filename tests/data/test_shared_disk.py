"""What can go wrong around a packed file: read-only or full disks, killed and competing processes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import packed
from functions.support.errors import UserError
from tests.data.packing import IMAGES, ROOT, forbid_decoding, load, packed_files, write_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_read_only_data_goes_to_the_cache_and_is_found_there(tmp_path, monkeypatch):
    one, two = write_folder(tmp_path / "1" / "set"), write_folder(tmp_path / "2" / "set", 255 - IMAGES)
    writable = packed.is_writable
    monkeypatch.setattr(packed, "is_writable", lambda folder: folder not in (one, two) and writable(folder))
    for path, expected in ((one, IMAGES), (two, 255 - IMAGES)):
        pack = load(path)
        np.testing.assert_array_equal(pack.images, expected)
        assert pack.path.parent == tmp_path / "cache" / "ddpm-packed-images"
        assert not packed_files(path)
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(one).images, IMAGES)


def test_whether_a_folder_can_be_written_is_tried(tmp_path):
    assert packed.is_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    if Path("/proc/self").exists():  # read-only even for root
        assert not packed.is_writable(Path("/proc/self"))


def test_a_disk_that_runs_full_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"0\.0 MB of images, cannot be written \(No space left on device\)\. Make room"
        ):
            load(path)
    assert packed_files(path) == ["set-8px.packed.lock"]
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_nowhere_to_write_is_said(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(packed, "is_writable", lambda folder: False)
    with pytest.raises(UserError, match=r"ddpm-packed-images/.* cannot be written \(Not a directory\)"):
        load(path)


# --- two processes, and a killed one ---------------------------------------------------------------------------------

SLOW_BUILD = """
import sys, time
from data import packed
from data.sources import find_source
fit_square = packed.fit_square
def slow_fit(rgb, image_size):
    time.sleep(float(sys.argv[2]))
    return fit_square(rgb, image_size)
packed.fit_square = slow_fit
print("start", flush=True)
pack = packed.open_packed(find_source(sys.argv[1], 8), 8)
print("sum", int(pack.images.astype(int).sum()))
"""


def start_slow_build(path, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(path), str(seconds)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path):
    path = write_folder(tmp_path / "set")
    processes = [start_slow_build(path, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(f"sum {IMAGES.sum()}" in output for output in outputs)
    assert sum("10 images at 8x8" in output for output in outputs) == 1  # only who prepares reports
    assert sum("waiting for it" in output for output in outputs) == 1
    assert not list(path.glob(".*.tmp"))


def test_after_a_kill_it_starts_again_cleanly(tmp_path):
    path = write_folder(tmp_path / "set")
    process = start_slow_build(path, 0.5)
    deadline = time.time() + 30
    while not list(path.glob(".*.packed.*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert packed_files(path) == [f".set-8px.packed.{process.pid}.tmp", "set-8px.packed.lock"]
    np.testing.assert_array_equal(load(path).images, IMAGES)
    assert packed_files(path) == ["set-8px.packed" + ending for ending in ("", ".json", ".lock")]


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
