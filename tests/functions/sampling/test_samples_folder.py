"""Many single images: shared by processes, killed and gone on with, and never mixed.

The processes are real ones of sample.py.
"""

import json
import os
import re
import shlex
import signal
from unittest.mock import Mock

import pytest
from PIL import Image

import sample
from functions.sampling.samples_folder import image_path
from functions.support.errors import UserError
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
    """Sample, and be killed when the tenth image would be written, the second of its batch."""
    write = sample.save_image

    def save(image, path):
        if path.stem == "00009":
            os.kill(os.getpid(), signal.SIGKILL)
        write(image, path)

    sample.save_image = save
    sample.main()


@posix
@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_made(whole, tiny_run, tmp_path, capsys):
    """The images are then, bit for bit, those that were made in one go."""
    command = [tiny_run, *FLAGS, "--out", tmp_path]
    program = Program(tmp_path / "printed", *command, act=sample_until_a_write_kills)
    assert program.wait() == -signal.SIGKILL, program.printed
    kept = written(tmp_path)
    assert len(kept) == 9

    # The second time there is nothing to do.
    for count in (14, 0):
        call(sample.main, *command)
        assert f"sampling {count} of 22 images" in capsys.readouterr().out
        assert kept.items() <= written(tmp_path).items()
        assert contents(tmp_path) == contents(whole)


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
    assert two.stdout.count("all 22 images are in") == 1
    assert two.stdout.count("\nguide ") == 1
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
        ("", "--individual --guide 5", ["guide", "guidance"]),
    ):
        # Without --individual there would only be a grid, which may not lie there either.
        with pytest.raises(UserError, match="has images with other settings") as error:
            call(sample.main, tiny_run / run, *common, *flags.split())
        assert re.findall(r"(\w+) was ", str(error.value)) == changed
    assert contents(tmp_path) == before


def test_two_commands_that_start_in_one_folder_do_not_mix_their_images(
    tiny_run, tmp_path, monkeypatch
):
    """The second opens the folder before the first has written an image, and the first ends."""
    command = [tiny_run, "--individual", "--steps", 2, "--n", 4, "--batch-size", 2]
    call(sample.main, *command, "--seed", 1, "--out", tmp_path / "alone")
    step_bar = sample.step_bar

    def start_the_second(*args):
        monkeypatch.setattr(sample, "step_bar", step_bar)
        call(sample.main, *command, "--seed", 1, "--out", tmp_path / "both")
        return step_bar(*args)

    monkeypatch.setattr(sample, "step_bar", start_the_second)
    with pytest.raises(UserError, match=r"other settings \(seed was 1, is now 0\)"):
        call(sample.main, *command, "--out", tmp_path / "both")
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_the_pictures_of_two_commands_are_those_of_the_last(tiny_run, tmp_path, monkeypatch):
    """The second starts while the first samples, and ends before it."""
    command = [tiny_run, "--steps", 2, "--n", 3, "--out", tmp_path]
    generate = sample.generate

    def start_the_second(*args, **options):
        call(sample.main, *command, "--seed", 1, "--gif")
        return generate(*args, **options)

    monkeypatch.setattr(sample, "generate", start_the_second)
    call(sample.main, *command)
    assert json.loads((tmp_path / "samples.json").read_text())["seed"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"samples.json", "grid.png"}


def test_an_empty_file_is_sampled_again(tiny_run, tmp_path):
    """An earlier version began the folder, and did not name the split in its manifest."""
    command = [tiny_run, "--individual", "--steps", 2, "--n", 3, "--out", tmp_path]
    call(sample.main, *command)
    before = contents(tmp_path)
    image_path(tmp_path, 1).write_bytes(b"")
    manifest = tmp_path / "samples.json"
    facts = json.loads(manifest.read_text())
    del facts["split"]
    manifest.write_text(json.dumps(facts))
    call(sample.main, *command)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_the_pictures_of_a_folder_belong_together(tiny_run, tmp_path, capsys):
    """They show as many images of the same settings; the others are removed, and that is said."""

    def pictures_after(*flags):
        call(sample.main, tiny_run, "--steps", 12, "--out", tmp_path, *flags)
        return {path.stem for path in tmp_path.iterdir() if not path.stem.isdecimal()} - {"samples"}

    assert pictures_after("--n", 4, "--gif", "--strip") == {"grid", "denoising", "strip"}
    # The same images, as single ones too, are no reason to remove any.
    pictures_after("--n", 2, "--individual")
    everything = pictures_after("--n", 4, "--progressive")
    assert everything == {"grid", "denoising", "strip", "progressive"}
    printed = capsys.readouterr().out
    assert "EMA weights after 10 of 10 steps" in printed
    assert f"wrote {tmp_path / 'grid.png'}" in printed
    assert "removed" not in printed
    # They show the noise and all steps, or nine of them.
    assert Image.open(tmp_path / "denoising.gif").n_frames == 13
    for name in ("strip.png", "progressive.png"):
        assert Image.open(tmp_path / name).width > 9 * 100
    assert pictures_after("--n", 5) == {"grid"}
    removed = "removed grid.png and strip.png and progressive.png and denoising.gif from"
    assert removed in capsys.readouterr().out

    # Single images may have taken hours, so with other settings nothing is done.
    with pytest.raises(UserError, match="has images with other settings"):
        pictures_after("--n", 5, "--seed", 1)
    for i in range(2):
        image_path(tmp_path, i).unlink()
    assert pictures_after("--n", 2, "--individual", "--seed", 1) == set()
    # Without a manifest they may be anybody's.
    (tmp_path / "samples.json").unlink()
    for i in range(2):
        image_path(tmp_path, i).unlink()
    (tmp_path / "strip.png").touch()
    with pytest.raises(UserError, match=r"samples\.json: there is no such file"):
        pictures_after("--n", 2)
    assert (tmp_path / "strip.png").exists()


def test_images_of_unknown_origin_are_not_gone_on_with(tiny_run, tmp_path):
    """Without a manifest, or with one that is cut short, nobody knows what they are."""
    Image.new("RGB", (16, 16)).save(image_path(tmp_path, 3))
    with pytest.raises(UserError, match=r"samples\.json: there is no such file"):
        call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    for text in ('{"sampler": ', "[]"):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(UserError, match=r"samples\.json: cannot be read"):
            call(sample.main, tiny_run, *FLAGS, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["00003.png"]


def test_a_failed_write_ends_the_script(tiny_run, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(sample, "save_image", full)
    with pytest.raises(OSError, match="No space left"):
        call(sample.main, tiny_run, "--individual", "--n", 3, "--steps", 2, "--out", tmp_path)
