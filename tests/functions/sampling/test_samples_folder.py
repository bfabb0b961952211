"""Many single images: shared by processes, killed and gone on with, and never mixed.

The processes are real ones of sample.py.
"""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from functions.sampling.samples_folder import image_path
from functions.support.pictures import grid_of
from tests.conftest import call, files_of, pixels_of, posix, refused, samples_of
from tests.forked import Program
from tests.functions.support.test_processes import two

TIME = r"\d{8}-\d{6}"
FEW = "--batch-size 4 --steps 4 --device cpu --guide 5"
FLAGS = f"{FEW} --individual -n 22"


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """Return a folder made in one go: 22 images in 6 batches."""
    folder = tmp_path_factory.mktemp("whole")
    call(sample, tiny_run, FLAGS, "--out", folder)
    return folder


def written(folder):
    """Return of each single image when its file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}


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
def test_after_a_kill_two_processes_make_only_what_is_missing(whole, tiny_run, tmp_path, capsys):
    """The images are then, bit for bit, those that one process made in one go."""
    folder = tmp_path / "samples"
    command = [tiny_run, FLAGS, "--out", folder]
    program = Program(tmp_path / "printed", *command, act=sample_until_a_write_kills)
    assert program.wait() == -signal.SIGKILL, program.printed
    kept = written(folder)
    # Of a batch only a part is there.
    assert len(kept) == 9
    # A power cut may leave an empty file.
    image_path(folder, 9).touch()

    programs = two(tmp_path, *command, act=sample.main)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed
    # Rank 0 alone speaks, and has the one bar.
    printed = "".join(program.printed for program in programs)
    for text in ("sampling 14 of 22 images", "all 22 images are in", "\nguide ", " 0.00/"):
        assert printed.count(text) == 1
    # Now there is nothing to do.
    call(sample, *command)
    assert "sampling 0 of 22 images" in capsys.readouterr().out
    assert kept.items() <= written(folder).items()
    assert files_of(folder) == files_of(whole)


def test_indices_are_images_of_the_seed(whole, tiny_run, tmp_path):
    """In a batch of the same size an image has the same bits, whatever the others are."""
    call(sample, tiny_run, FEW, "--indices 6 1 7 3 --out", tmp_path)
    expected = grid_of(samples_of(whole)[[6, 1, 7, 3]])
    assert np.array_equal(pixels_of(tmp_path / "grid.png"), expected)


def test_a_folder_of_other_settings_is_refused(tiny_run, tmp_path):
    """Whether it has single images or pictures, and whichever are asked for."""
    common = "-n 2 --steps 5 --device cpu --out"
    single, pictures = (tmp_path / name for name in ("single", "pictures"))
    call(sample, tiny_run, "--individual", common, single)
    call(sample, tiny_run, common, pictures, "--gif")
    before = [files_of(single), files_of(pictures)]
    early = "checkpoints/step-00000005.safetensors"
    for folder, run, flags, changed in (
        (
            single,
            early,
            "--seed 1 --precision bfloat16 --guide 5",
            "checkpoint seed precision guide guidance grid",
        ),
        (pictures, "", "--sampler ddim", "sampler eta variance"),
        (single, "", "--steps 4 --spacing logsnr --individual", "steps spacing"),
        # So are pictures of other images, and single images in a folder of pictures.
        (pictures, "", "-n 3", "grid"),
        (pictures, "", "--individual", "grid"),
    ):
        with refused("of other settings") as error:
            call(sample, tiny_run / run, common, folder, flags)
        assert re.findall(r"(\w+) was ", str(error.value)) == changed.split()
    assert [files_of(single), files_of(pictures)] == before
    call(sample, tiny_run, common, pictures)
    call(sample, tiny_run, "--individual", common, single, "-n 3")
    names = {path.stem for path in single.glob("*.png")}
    assert names == {"00000", "00001", "00002"}


def test_samples_without_a_folder_go_into_a_new_one_named_by_the_time(tiny_run, unfinished, here):
    """In the run; of an exported file under its name, here. test_recipes.py has recipes."""
    call(sample, tiny_run, "--export", "there/x.safetensors")
    for run, folder, name in (
        (unfinished, unfinished / "samples", TIME),
        ("there/x.safetensors", Path("samples"), f"x-{TIME}"),
    ):
        before = {*folder.glob("*")}
        call(sample, run, "--device cpu --steps 2 --n 1")
        [new] = {*folder.glob("*")} - before
        assert re.fullmatch(name, new.name)
        assert {path.name for path in new.iterdir()} == {"grid.png", "samples.json"}


def test_what_is_named_otherwise_is_no_sample(whole, tiny_run, tmp_path):
    shutil.copy(whole / "00002.png", tmp_path / "1.png")
    call(sample, tiny_run, f"{FEW} --individual -n 4 --out", tmp_path)
    assert np.array_equal(samples_of(tmp_path), samples_of(whole)[:4])


@pytest.mark.parametrize("name", ["00003.png", "grid.png"])
def test_images_of_unknown_origin_are_not_gone_on_with(name, tiny_run, tmp_path):
    """Without a manifest, or with one that is cut short, nobody knows what they are."""
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    for text, reason in (("", "there is no such file"), ("[]", "cannot be read")):
        if text:
            (tmp_path / "samples.json").write_text(text)
        with refused(rf"samples\.json: {reason}"):
            call(sample, tiny_run, FLAGS, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == [name]
