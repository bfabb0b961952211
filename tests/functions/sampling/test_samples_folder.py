"""Many single images: shared by processes, killed and gone on with, and never mixed.

The processes are real ones of sample.py.
"""

import os
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

import edit
import sample
from functions.sampling import generation
from functions.sampling.samples_folder import image_path
from functions.saved import run_folder
from tests.conftest import call, posix, refused
from tests.forked import Program
from tests.functions.support.test_processes import two

TIME = r"\d{8}-\d{6}"
FLAGS = "--individual -n 22 --batch-size 4 --steps 4 --device cpu --guide 5"


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """Return a folder made in one go: 22 images in 6 batches."""
    folder = tmp_path_factory.mktemp("whole")
    call(sample, tiny_run, FLAGS, "--out", folder)
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
    command = [tiny_run, FLAGS, "--out", tmp_path]
    program = Program(tmp_path / "printed", *command, act=sample_until_a_write_kills)
    assert program.wait() == -signal.SIGKILL, program.printed
    kept = written(tmp_path)
    assert len(kept) == 9
    # A power cut may leave an empty file.
    image_path(tmp_path, 9).touch()

    # The second time there is nothing to do.
    for count in (14, 0):
        call(sample, *command)
        assert f"sampling {count} of 22 images" in capsys.readouterr().out
        assert kept.items() <= written(tmp_path).items()
        assert contents(tmp_path) == contents(whole)


@posix
@pytest.mark.slow
def test_two_processes_make_the_images_of_one(whole, tiny_run, tmp_path):
    """They go on with what one process began, and the images are, bit for bit, those of one.

    What it began are fewer images, of which one was lost, so that of a batch only a part is there.
    """
    call(sample, tiny_run, FLAGS, "-n 8 --out", tmp_path)
    image_path(tmp_path, 5).unlink()
    kept = written(tmp_path)
    folder = tmp_path.with_name("printed")
    folder.mkdir()
    programs = two(folder, tiny_run, FLAGS, "--out", tmp_path, act=sample.main)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed

    # Rank 0 alone speaks, and has the one bar.
    printed = "".join(program.printed for program in programs)
    assert printed.count("all 22 images are in") == 1
    assert printed.count("\nguide ") == 1
    assert printed.count(" 0.00/") == 1

    assert kept.items() <= written(tmp_path).items()
    assert contents(tmp_path) == contents(whole)
    manifests = [(folder / "samples.json").read_bytes() for folder in (whole, tmp_path)]
    assert manifests[0] == manifests[1]


def test_a_folder_of_other_settings_is_refused(tiny_run, tmp_path):
    """Whether it has single images or pictures, and even if nothing is in it yet."""
    common = "-n 2 --steps 5 --device cpu --out"
    single, pictures = (tmp_path / name for name in ("single", "pictures"))
    call(sample, tiny_run, "--individual", common, single)
    call(sample, tiny_run, common, pictures, "--strip")
    before = [contents(single), contents(pictures)]
    early = "checkpoints/step-00000005.safetensors"
    for run, flags, changed in (
        (early, "--seed 1 --precision bfloat16", "checkpoint seed precision"),
        ("", "--sampler ddim", "sampler eta variance"),
        ("", "--steps 4 --spacing logsnr", "steps spacing first_log_snr"),
        ("", "--guide 5", "guide guidance"),
    ):
        for folder in (single, pictures):
            for kind in ("", "--individual"):
                with refused("of other settings") as error:
                    call(sample, tiny_run / run, common, folder, kind, flags)
                assert re.findall(r"(\w+) was ", str(error.value)) == changed.split()
    # Pictures of other images are refused, too, but not single images of the same settings.
    with refused(r"grid was \[0, 1\], is now \[0, 1, 2\]"):
        call(sample, tiny_run, common, pictures, "-n 3")
    assert [contents(single), contents(pictures)] == before
    call(sample, tiny_run, "--individual", common, pictures, "-n 3")
    call(sample, tiny_run, common, pictures, "--progressive")
    call(sample, tiny_run, common, single)
    names = {path.stem for path in pictures.glob("*.png")}
    assert names == {"grid", "strip", "progressive", "00000", "00001", "00002"}


def test_samples_without_a_folder_go_into_a_new_one_named_by_the_time(
    tiny_run, unfinished, tmp_path, monkeypatch
):
    """In the run, beside an exported file, and for a recipe, under its name, here."""
    monkeypatch.chdir(tmp_path)
    few = "--device cpu --steps 2 -n 1"
    call(sample, tiny_run, "--export", "there/x.safetensors")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"model = {str(tiny_run)!r}")
    for run, folder, name in (
        (unfinished, unfinished / "samples", TIME),
        ("there/x.safetensors", Path("there/samples"), f"x-{TIME}"),
        (recipe, Path("samples"), f"{recipe.stem}-{TIME}"),
    ):
        before = {*folder.glob("*")}
        for _ in range(2):
            call(sample, run, few)
        call(edit, "vary 0", run, few.replace("-n 1", "--depths 0"))
        new = {*folder.glob("*")} - before
        assert all(re.fullmatch(name, path.name) for path in new)
        names = sorted(file.name for path in new for file in path.glob("*.png"))
        assert names == ["grid.png", "grid.png", "variations-0.png"]
        assert len([*folder.glob("*/samples.json")]) == 3


def test_samples_into_a_link_that_leads_nowhere_are_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("samples").symlink_to("away")
    with refused("samples is a link to away, which is not there"):
        run_folder.new_folder(Path("samples/inner"), "people")


@pytest.mark.parametrize("kind", ["--individual", "--gif"])
def test_two_commands_that_start_at_once_do_not_mix_their_samples(
    kind, tiny_run, tmp_path, monkeypatch
):
    """The second replaces the manifest before the first has written an image."""
    command = [tiny_run, kind, "--steps 2 --n 4 --batch-size 2 --out", tmp_path]
    step_bar = generation.step_bar

    def replace_the_manifest(*args):
        path = tmp_path / "samples.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        return step_bar(*args)

    monkeypatch.setattr(sample, "step_bar", replace_the_manifest)
    monkeypatch.setattr(generation, "step_bar", replace_the_manifest)
    with refused(r"other settings \(seed was 1, is now 0\)"):
        call(sample, *command)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]


@pytest.mark.parametrize("name", ["00003.png", "strip.png"])
def test_images_of_unknown_origin_are_not_gone_on_with(name, tiny_run, tmp_path):
    """Without a manifest, or with one that is cut short, nobody knows what they are."""
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    with refused(r"samples\.json: there is no such file"):
        call(sample, tiny_run, FLAGS, "--out", tmp_path)
    for text in ('{"sampler": ', "[]"):
        (tmp_path / "samples.json").write_text(text)
        with refused(r"samples\.json: cannot be read"):
            call(sample, tiny_run, FLAGS, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == [name]
