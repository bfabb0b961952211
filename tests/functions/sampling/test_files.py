"""Many single images: shared by processes, killed and gone on with, and never mixed. Real processes of sample.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

import sample
from functions.sampling import files
from functions.sampling.files import existing, image_path
from functions.support.errors import UserError
from functions.support.pictures import save_image
from functions.support.run_folder import locked
from tests.conftest import ROOT, call, script

FLAGS = ["--individual", "-n", 22, "--batch-size", 4, "--steps", 30, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """A folder made in one go: 22 images in 6 batches."""
    folder = tmp_path_factory.mktemp("whole")
    call(sample.main, tiny_run, *FLAGS, "--out", folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_after_a_kill_only_what_is_missing_is_made(whole, tiny_run, tmp_path, capsys):
    command = [sys.executable, "sample.py", *map(str, [tiny_run, *FLAGS, "--out", tmp_path])]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(existing(tmp_path)) < 6 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = existing(tmp_path)
    assert 6 <= len(kept) < 22
    (tmp_path / ".00021.png.1234.tmp").write_bytes(b"half of it")
    before = {i: image_path(tmp_path, i).stat() for i in kept}

    again = script("sample.py", tiny_run, *FLAGS, "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "of 22; the others are there" in again.stdout
    for i, status in before.items():
        now = image_path(tmp_path, i).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert contents(tmp_path) == contents(whole)  # the grid is among them
    assert not list(tmp_path.glob(".*.tmp"))

    call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    assert "sampling 0 images of 22" in capsys.readouterr().out
    assert contents(tmp_path) == contents(whole)


def test_two_processes_make_the_images_of_one(whole, tiny_run, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "samples.json").write_bytes((whole / "samples.json").read_bytes())
    for i in (0, 1, 2, 3, 9):  # of a start with one process
        image_path(tmp_path / "part", i).write_bytes(image_path(whole, i).read_bytes())
    two = script(*torchrun, tiny_run, *FLAGS, "--progressive", "--out", tmp_path / "part")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("all 22 images are there") == 1  # rank 0 alone speaks
    assert two.stderr.count(" 0.00/360 ") == 1  # one bar, of rank 0: 3 of 6 batches, all of which are to be seen
    one = contents(whole)
    both = contents(tmp_path / "part")
    assert both.keys() == one.keys() | {"progressive.png"}
    assert all(both[name] == one[name] for name in one)


def test_two_processes_share_a_grid_without_files(tiny_run, tmp_path):
    flags = [tiny_run, "-n", 5, "--batch-size", 2, "--steps", 3, "--gif", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    two = script(*torchrun, *flags, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    call(sample.main, *flags, "--out", tmp_path / "one")
    for name in ("grid.png", "denoising.gif"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not list((tmp_path / "two").glob("0*.png"))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--seed", 1], "seed was 0, is now 1"),
        (["--steps", 29], "steps was 30, is now 29"),
        (["--sampler", "dpm++"], r"sampler was ddpm, is now dpm\+\+"),
        (["--variance", "large"], "variance was small, is now large"),
        (["--eps-scale", 1.01], r"eps_scale was 1\.0, is now 1\.01"),
        (["--spacing", "logsnr"], "spacing was trailing, is now logsnr"),
        (["--precision", "bfloat16"], "precision was float32, is now bfloat16"),
        (["{older}"], "checkpoint was [0-9a-f]{64}, is now"),
    ],
)
def test_other_options_in_the_same_folder_are_an_error(whole, tiny_run, flags, field):
    before = contents(whole)
    flags = [str(flag).format(older=tiny_run / "checkpoints" / "step-00000005.safetensors") for flag in flags]
    run = [] if flags[0].endswith(".safetensors") else [tiny_run]
    with pytest.raises(UserError, match=field):
        call(sample.main, *run, *FLAGS, *flags, "--out", whole)
    with pytest.raises(UserError, match=field):  # nor may a grid of theirs lie beside the images
        call(sample.main, *run, *FLAGS[1:-2], *flags, "--device", "cpu", "--out", whole)
    assert contents(whole) == before


def test_more_images_of_the_same_kind_may_follow(whole, tiny_run, tmp_path):
    flags = [tiny_run, "--individual", "--device", "cpu", "--batch-size", 4, "--steps", 30, "--out", tmp_path]
    call(sample.main, *flags, "--n", 8)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    call(sample.main, *flags, "--n", 22)
    assert contents(tmp_path) == contents(whole)
    assert all((tmp_path / name).stat().st_mtime_ns == written for name, written in first.items())


def test_images_of_unknown_origin_are_not_gone_on_with(tiny_run, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "00003.png")
    with pytest.raises(UserError, match=r"holds 00003\.png but no samples\.json"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    (tmp_path / "samples.json").write_text('{"sampler": ')
    with pytest.raises(UserError, match=r"samples\.json: damaged"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    (tmp_path / "samples.json").write_text("[1]")
    with pytest.raises(UserError, match="sampler was None"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["00003.png"]


def test_a_folder_is_for_one_process_at_a_time(tiny_run, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="making images in this folder already"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)


def test_the_manifest_tells_what_the_images_are(whole):
    facts = json.loads((whole / "samples.json").read_text())
    assert len(facts.pop("checkpoint")) == 64
    assert facts == {"weights": "EMA", "seed": 0, "precision": "float32", "sampler": "ddpm", "steps": 30,
                     "spacing": "trailing", "eps_scale": 1.0, "variance": "small"}  # fmt: skip


def test_images_are_not_all_kept_in_memory(tiny_run, tmp_path, monkeypatch):
    """When a batch is written, all but the one before are on the disk; and the grid shows the first images."""
    there = {}

    def save(image, path):
        there[int(path.stem)] = existing(tmp_path)
        save_image(image, path)

    monkeypatch.setattr(sample, "save_image", save)
    monkeypatch.setattr(files, "MOST_IN_GRID", 4)
    call(sample.main, tiny_run, "--individual", "--n", 10, "--batch-size", 2, "--steps", 2, "--out", tmp_path)
    assert sorted(there) == list(range(10))
    assert all(found >= set(range(i // 2 * 2)) for i, found in there.items())
    assert Image.open(tmp_path / "grid.png").width < 2.5 * 100  # 2 x 2 images of 96 pixels


def test_a_failed_write_ends_the_script(tiny_run, tmp_path, monkeypatch):
    def full(image, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "save_image", full)
    with pytest.raises(OSError, match="No space left"):
        call(sample.main, tiny_run, "--individual", "--n", 3, "--steps", 2, "--out", tmp_path)
    assert not (tmp_path / "grid.png").exists()


def test_numbers_beyond_five_digits_keep_the_names_of_the_others(tmp_path):
    for i in (0, 99_999, 100_000, 1_234_567):
        image_path(tmp_path, i).touch()
    (tmp_path / "0000007.png").touch()  # none of ours
    assert existing(tmp_path) == {0, 99_999, 100_000, 1_234_567}
