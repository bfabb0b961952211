"""Many single images: shared by processes, killed and gone on with, and never mixed.

The processes are real ones of sample.py.
"""

import itertools
import os
import re
import shlex
import signal
from unittest.mock import Mock

import pytest
from PIL import Image

import sample
from functions.sampling.files import image_indices, image_path
from functions.support.errors import UserError
from functions.support.pictures import save_image
from functions.support.run_folder import locked
from tests.conftest import call, posix, script
from tests.forked import Program

FLAGS = shlex.split("--individual -n 22 --batch-size 4 --steps 30 --device cpu --guide 5")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """Return a folder made in one go: 22 images in 6 batches."""
    folder = tmp_path_factory.mktemp("whole")
    call(sample.main, tiny_run, *FLAGS, "--out", folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def written(folder):
    """Return of each single image what changes when its file is written again."""
    stats = {path.name: path.stat() for path in folder.glob("0*.png")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def sample_until_a_write_kills():
    """Sample, and be killed at the tenth image, of the third batch.

    Two batches are on the disk then.
    """
    write = sample.save_image

    # Several threads write, and no two of them get the same number from this.
    calls = itertools.count(1)

    def save(image, path):
        if next(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        write(image, path)

    sample.save_image = save
    sample.main()


@posix
@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_made(whole, tiny_run, tmp_path, capsys):
    """The folder is then, bit for bit, the one that was made in one go."""
    command = [tiny_run, *FLAGS, "--out", tmp_path]
    program = Program(tmp_path / "printed", *command, act=sample_until_a_write_kills)
    assert program.wait() == -signal.SIGKILL, program.printed
    kept = written(tmp_path)
    assert 8 <= len(kept) < 12

    # A kill can leave a file that was being written, too.
    (tmp_path / ".00021.png.1234.tmp").write_bytes(b"half of it")

    # The second time there is nothing to do. The grid is among the files that are compared.
    for said in ("of 22; the others exist", "sampling 0 images of 22"):
        call(sample.main, *command)
        assert said in capsys.readouterr().out
        assert kept.items() <= written(tmp_path).items()
        assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(whole, tiny_run, tmp_path):
    """They go on with what one process began, and the images are, bit for bit, those of one.

    What it began are fewer images, of which one was lost, so that of a batch only a part is there.
    """
    call(sample.main, tiny_run, *FLAGS, "-n", 8, "--out", tmp_path)
    image_path(tmp_path, 5).unlink()
    kept = written(tmp_path)
    two = script(*TORCHRUN, tiny_run, *FLAGS, "--out", tmp_path)
    assert two.returncode == 0, two.stderr

    # Rank 0 alone speaks, and has the one bar.
    assert two.stdout.count("all 22 images exist") == 1
    assert two.stdout.count(" network calls in ") == 1
    assert two.stderr.count(" 0.00/") == 1

    assert kept.items() <= written(tmp_path).items()
    assert contents(tmp_path) == contents(whole)
    manifests = [(folder / "samples.json").read_bytes() for folder in (whole, tmp_path)]
    assert manifests[0] == manifests[1]


def test_other_options_in_the_same_folder_are_an_error(tiny_run, tmp_path):
    common = ["-n", 2, "--steps", 5, "--device", "cpu", "--out", tmp_path]
    call(sample.main, tiny_run, "--individual", *common)
    before = contents(tmp_path)
    for run, flags, changed in (
        ("checkpoints/step-00000005.safetensors", "--seed 1", ["checkpoint", "seed"]),
        ("", "--sampler ddim", ["sampler", "eta", "variance"]),
        ("", "--precision bfloat16 --steps 4 --spacing logsnr", ["precision", "steps", "spacing"]),
        ("", "--individual --guide 5", ["guide", "guidance", "guided_log_snr"]),
    ):
        # Without --individual there would only be a grid, which may not lie there either.
        with pytest.raises(UserError, match="has images with other settings") as error:
            call(sample.main, tiny_run / run, *common, *flags.split())
        assert re.findall(r"(\w+) was ", str(error.value)) == changed
    assert contents(tmp_path) == before


def test_images_of_unknown_origin_are_not_gone_on_with(tiny_run, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "00003.png")
    with pytest.raises(UserError, match=r"has 00003\.png, but no samples\.json"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)

    # Another process may be making images there, too.
    with locked(tmp_path), pytest.raises(UserError, match="already making images in this folder"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)

    # A manifest that is cut short tells nothing of them either.
    (tmp_path / "samples.json").write_text('{"sampler": ')
    with pytest.raises(UserError, match=r"samples\.json: cannot be read"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["00003.png"]


def test_images_are_not_all_kept_in_memory(tiny_run, tmp_path, monkeypatch):
    """When a batch is written, all batches but the one before are on the disk.

    The grid shows the first images.
    """
    # For each image, the numbers of those that were on the disk when it was written.
    on_disk = {}

    def save(image, path):
        on_disk[int(path.stem)] = image_indices(tmp_path)
        save_image(image, path)

    monkeypatch.setattr(sample, "save_image", save)
    monkeypatch.setattr(sample, "GRID_LIMIT", 4)
    flags = "--individual --n 10 --batch-size 2 --steps 2 --out"
    call(sample.main, tiny_run, *flags.split(), tmp_path)
    assert sorted(on_disk) == list(range(10))
    for i, images in on_disk.items():
        assert images >= set(range(i // 2 * 2))

    # It has 2 x 2 images of 96 pixels.
    assert Image.open(tmp_path / "grid.png").width < 2.5 * 100


def test_a_checkpoint_and_a_snapshot_of_one_step_have_folders_of_their_own(trained):
    run = trained("--diffusion.snapshot-every", 10)
    for folder in ("checkpoints", "snapshots"):
        call(sample.main, run / folder / "step-00000010.safetensors", "--n", 1, "--steps", 1)
    names = {path.parent.name for path in (run / "samples").glob("*/grid.png")}
    start = "step-00000010-ddpm1-float32-seed0"
    assert names == {start, f"snapshot-{start}"}


def test_a_failed_write_ends_the_script(tiny_run, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(sample, "save_image", full)
    with pytest.raises(OSError, match="No space left"):
        call(sample.main, tiny_run, "--individual", "--n", 3, "--steps", 2, "--out", tmp_path)
    assert not (tmp_path / "grid.png").exists()
