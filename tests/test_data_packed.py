"""data/packed.py and data/reading.py: prepared once, safely, and again only when something changed."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import disk, packed, reading
from data.decode import BadImage
from data.packed import open_packed
from data.sources import DataError, find_source

ROOT = Path(__file__).resolve().parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_folder(path, images=IMAGES):
    path.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return path


def write_zip(path, images=IMAGES):
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            archive.writestr(f"{number:05d}.png", buffer.getvalue())
    return path


def load(path, size=8, **options):
    return open_packed(find_source(path, size), size, quiet=True, **options)


def packed_files(folder):
    return sorted(path.name for path in folder.iterdir() if ".packed" in path.name)


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(packed, "map_images", lambda *_: pytest.fail("decoded again"))


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
    assert packed_files(pack.path.parent) == [
        f"{path.name}-8px.packed" + ending for ending in ("", ".json", ".lock", ".report.txt")
    ]
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


def test_processes_give_what_one_gives_and_name_the_bad(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set", np.concatenate([IMAGES] * 5))
    (path / "00007.png").write_bytes(b"no image")
    monkeypatch.setattr(reading, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(reading, "available_cores", lambda: 2)
    for root in (path, Path(shutil.make_archive(str(path), "zip", path))):
        pack = load(root, max_bad_images=1)
        np.testing.assert_array_equal(pack.images, np.delete(np.concatenate([IMAGES] * 5), 7, axis=0))
        assert pack.ids == [number for number in range(50) if number != 7]
        assert pack.bad_images[0][0] == "00007.png"


def die(pixels):
    os._exit(9)


def test_a_killed_worker_ends_the_run_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(reading, "available_cores", lambda: 2)
    with pytest.raises(DataError, match="died"):
        list(reading.map_images(find_source(write_folder(tmp_path / "set"), 8), die))


def test_bad_images_are_listed_and_counted(tmp_path, capsys, monkeypatch):
    path = write_folder(tmp_path / "set")
    (path / "00002.png").write_bytes((path / "00002.png").read_bytes()[:100])
    (path / "00005.jpg").write_text("<html>quota exceeded</html>")
    (path / "00005.png").unlink()
    source = find_source(path, 8)
    with pytest.raises(DataError, match=r"2 unusable.*1 allowed.*00002\.png"):
        open_packed(source, 8, max_bad_images=1)
    printed = capsys.readouterr().out
    report = (path / "set-8px.packed.report.txt").read_text()
    for text in (printed, report):
        assert "8 images" in text and "2 left out" in text
        assert "00002.png: broken" in text and "00005.jpg: not a PNG" in text
    # Allowing them needs no second decoding, and the limit holds for a pack that is there already.
    forbid_decoding(monkeypatch)
    assert load(path, max_bad_images=2).ids == [0, 1, 3, 4, 6, 7, 8, 9]
    with pytest.raises(DataError, match="2 unusable"):
        load(path)


def test_a_set_without_one_good_image_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"not one.*a\.png.*empty file"):
        load(tmp_path / "set", max_bad_images=5)


def test_what_cannot_be_read_is_a_bad_image(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    (path / "00011.png").symlink_to("nowhere.png")
    monkeypatch.setattr(reading, "MAX_MEMBER_BYTES", 1000)
    (path / "00012.png").write_bytes(bytes(1001))
    assert [name for name, _ in load(path, max_bad_images=2).bad_images] == ["00011.png", "00012.png"]

    archive = write_zip(tmp_path / "set.zip")
    data = bytearray(archive.read_bytes())
    data[100] ^= 1  # inside the first member's pixels: its checksum no longer fits
    archive.write_bytes(bytes(data))
    bad = load(archive, max_bad_images=1).bad_images
    assert bad[0][0] == "00000.png" and "CRC" in bad[0][1]


def test_the_report_counts_what_was_enlarged_and_cropped(tmp_path, capsys):
    path = write_folder(tmp_path / "set")
    Image.new("RGB", (9, 8)).save(path / "00010.png")
    Image.new("RGB", (4, 4)).save(path / "00011.png")
    open_packed(find_source(path, 8), 8)
    printed = capsys.readouterr().out
    assert "1 not square" in printed and "1 smaller than 8 px" in printed


def test_quiet_prints_nothing(tmp_path, capsys):
    load(write_folder(tmp_path / "set"))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_cut_npz_is_an_error(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + IMAGES[:5].tobytes())
    with pytest.raises(DataError, match="cut short"):
        load(tmp_path / "a.npz")


# --- where it goes, and the disk -------------------------------------------------------------------------------------


def test_read_only_data_goes_to_the_cache_and_is_found_there(tmp_path, monkeypatch):
    one, two = write_folder(tmp_path / "1" / "set"), write_folder(tmp_path / "2" / "set", 255 - IMAGES)
    writable = packed.is_writable
    monkeypatch.setattr(packed, "is_writable", lambda folder: folder not in (one, two) and writable(folder))
    for path, expected in ((one, IMAGES), (two, 255 - IMAGES)):
        pack = load(path)
        np.testing.assert_array_equal(pack.images, expected)
        assert pack.path.parent == packed.cache_folder() and tmp_path in pack.path.parents
        assert not packed_files(path)
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(load(one).images, IMAGES)


def test_nowhere_to_write_is_an_error(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    monkeypatch.setattr(packed, "is_writable", lambda folder: False)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        load(path)


def test_whether_a_folder_can_be_written_is_tried(tmp_path):
    assert disk.is_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").write_text("")
    assert not disk.is_writable(tmp_path / "file" / "folder")
    if Path("/proc/self").exists():  # read-only even for root
        assert not disk.is_writable(Path("/proc/self"))


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0, 0, IMAGES.nbytes - 1))
    forbid_decoding(monkeypatch)
    with pytest.raises(DataError, match=r"0\.0 MB free"):
        load(path)
    assert packed_files(path) == ["set-8px.packed.lock"]


def test_a_disk_that_runs_full_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        with pytest.raises(DataError, match="ran full"):
            load(path)
    assert packed_files(path) == ["set-8px.packed.lock"]
    np.testing.assert_array_equal(load(path).images, IMAGES)


def test_sizes_in_words():
    assert disk.format_bytes(70_000 * 128 * 128 * 3) == "3.44 GB"
    assert disk.format_bytes(3_188_736) == "3.2 MB"


# --- two processes, and a killed one ---------------------------------------------------------------------------------

SLOW_BUILD = """
import sys, time
from data import packed
from data.sources import find_source
fit = packed._fit
def slow_fit(rgb, image_size):
    time.sleep(float(sys.argv[2]))
    return fit(rgb, image_size)
packed._fit = slow_fit
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
    processes = [start_slow_build(path, 0.1) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(f"sum {IMAGES.sum()}" in output for output in outputs)
    assert sum("10 images at 8x8" in output for output in outputs) == 1  # only who prepares reports
    assert sum("waiting for it" in output for output in outputs) == 1
    assert not list(path.glob("*.tmp"))


def test_after_a_kill_it_starts_again_cleanly(tmp_path):
    path = write_folder(tmp_path / "set")
    process = start_slow_build(path, 0.5)
    deadline = time.time() + 30
    while not list(path.glob("*.packed.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert packed_files(path) == ["set-8px.packed.lock", "set-8px.packed.tmp"]
    np.testing.assert_array_equal(load(path).images, IMAGES)
    assert packed_files(path) == ["set-8px.packed" + ending for ending in ("", ".json", ".lock", ".report.txt")]


def dawdle(pixels):
    print("working", flush=True)
    time.sleep(60)


DAWDLING = """
import sys
sys.path.insert(0, "tests")
import test_data_packed
from data import reading
from data.sources import find_source
reading.IN_PROCESS_BYTES, reading.available_cores = 0, lambda: 2
list(reading.map_images(find_source(sys.argv[1], 8), test_data_packed.dawdle))
"""


def test_the_workers_of_a_killed_process_end_too(tmp_path):
    path = write_folder(tmp_path / "set")
    process = subprocess.Popen([sys.executable, "-c", DAWDLING, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # the workers inherited stdout, which ends when the last of them does


def test_bad_images_travel_between_processes():
    import pickle

    assert str(pickle.loads(pickle.dumps(BadImage("animated")))) == "animated"
