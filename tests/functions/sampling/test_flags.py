"""Samplers by flag: each gives the images of its options, and some flags are refused."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import edit
import sample
import train
from data.pixels import to_uint8
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, Sampler, ddim_sample
from functions.sampling.generation import ImageSampler, generate, open_sampler
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.support.loading import load_denoiser
from functions.support.processes import SINGLE_PROCESS
from functions.timesteps import SPACINGS, sampling_times
from tests.conftest import CPU, ROOT, call


@pytest.mark.parametrize(
    ("flags", "options", "text", "short_name"),
    [
        pytest.param(
            "",
            SamplerOptions(),
            "ddpm, trailing, all steps, variance small",
            "ddpm",
            marks=pytest.mark.slow,
        ),
        (
            "--steps 9 --variance large",
            SamplerOptions("ddpm", 9, variance="large"),
            "ddpm, trailing, 9 steps, variance large",
            "ddpm9-variance-large",
        ),
        (
            "--sampler dpm++ --steps 9 --spacing trailing --eta 0",
            SamplerOptions("dpm++", 9, "trailing", eta=0.0),
            "dpm++, trailing, 9 steps, eta 0.0",
            "dpmpp9-spacing-trailing-eta-0.0",
        ),
        (
            "--sampler ddim --steps 7 --eta 0.5 --spacing logsnr",
            SamplerOptions("ddim", 7, "logsnr", eta=0.5),
            "ddim, logsnr, 7 steps, eta 0.5",
            "ddim7-spacing-logsnr-eta-0.5",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags_give_the_images_of_their_options(
    flags, options, text, short_name, tiny_run, tmp_path, capsys
):
    flags += " --seed 3 --n 2 --individual --out"
    call(sample.main, tiny_run, *flags.split(), tmp_path)
    assert f"{text}, seed 3" in capsys.readouterr().out
    assert str(options) == text
    assert options.short_name == short_name

    # The files are compared with what these options give in memory.
    image_sampler = ImageSampler(load_denoiser(tiny_run), options, (3, 16, 16), 3, CPU)
    expected = to_uint8(generate(image_sampler, range(2)).images)
    images = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    assert np.array_equal(images, expected)


def test_a_new_sampler_is_a_function_and_a_row(unfinished, tmp_path, monkeypatch, capsys):
    """The scripts and the grids of training know it, and refuse options that it does not have."""
    row = Sampler(ddim_sample, {"spacing": "logsnr"}, "Euler's method")
    monkeypatch.setitem(SAMPLERS, "euler", row)

    with pytest.raises(SystemExit):
        call(sample.main, "--help")
    assert "euler is Euler's method" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="the options of --sampler euler are --spacing"):
        SamplerOptions("euler", eta=0.5)

    call(train.main, "--resume", unfinished, "--diffusion.grid-sampler", "euler")
    call(sample.main, unfinished, "--n", 4, "--steps", 4, "--sampler", "euler", "--out", tmp_path)
    script = np.asarray(Image.open(tmp_path / "grid.png")).astype(float)
    training = np.asarray(Image.open(unfinished / "samples" / "step-00000010.png"))
    # Rounding differs, and the layout of the networks in memory.
    assert abs(script - training).max() <= 2


@pytest.mark.parametrize("spacing", SPACINGS)
def test_edits_begin_at_one_of_the_samplers_timesteps(spacing):
    """The nearest one to the depth; depths 0 and 1 are the image and the noise."""
    scheduler = NoiseScheduler(1000)
    denoiser = Denoiser(torch.nn.Identity(), scheduler)
    options = SamplerOptions("dpm++", 20, spacing)
    image_sampler = ImageSampler(denoiser, options, (3, 16, 16), 0, CPU)
    times = sampling_times(scheduler, 20, spacing)
    assert [image_sampler.time_at(depth) for depth in (0, 1)] == [-1, 999]
    for depth in (0.1, 0.25, 0.6):
        distances = {t: abs(t + 1 - 1000 * depth) for t in times}
        assert distances[image_sampler.time_at(depth)] == min(distances.values())


def test_images_that_do_not_fit_are_refused(tiny_run, pictures, tmp_path):
    picture = pictures / "00000.png"
    for images, message in (
        (["vary", picture], "00000.png is 20x20 pixels, the model's images are 16x16; --fit"),
        (["interpolate", 1, tmp_path / "no.png"], "no.png: No such file .*; give an image file"),
        (["vary", ROOT / "README.md"], "README.md: not a PNG"),
    ):
        with pytest.raises(UserError, match=message):
            call(edit.main, *images, tiny_run, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_manifest_has_all_of_a_guide():
    options = SamplerOptions(guide="4", guide_digest="abc", guidance=2.0)
    facts = {"guide": "abc", "guidance": 2.0, "guided_log_snr": [-7.0, 6.0]}
    assert facts.items() <= options.facts(100).items()


@pytest.mark.parametrize(("flags", "size"), [([], 16), (["--batch-size", 20], 20)])
def test_a_cpu_samples_few_images_at_a_time(tiny_run, flags, size):
    args = call(partial(sample.parse_flags, 36, False), tiny_run, "--device", "cpu", *flags)
    assert open_sampler(args, SINGLE_PROCESS)[1].batch_size == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--individual --n 2 --strip", "^--individual draws no figures"),
        ("--individual --gif", "^--individual draws no figures"),
        ("--export x --calibrate own", "^--calibrate would be ignored with --export$"),
        ("--export x --batch-size 2", "--batch-size would be ignored with --export"),
        ("--export x --n 2", "--n would be ignored with --export"),
        ("RUN --interpolate 1 2", "a command .*: python edit.py interpolate A B$"),
        ("--variations=1", "python edit.py vary A"),
        ("--mask b.png --inpaint a.png", "python edit.py inpaint A"),
    ],
)
def test_what_would_be_ignored_or_has_moved_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        call(sample.main, *flags.split())


def test_flags_that_suit_an_export_are_not_refused():
    args = call(partial(sample.parse_flags, 20, True), "--export", "x", "--seed", 1)
    assert args.export.name == "x"
