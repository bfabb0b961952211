"""Samplers by flag: each gives the images of its options. test_bad_input.py has what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

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
from tests.conftest import CPU, call


@pytest.mark.parametrize(
    ("flags", "options", "text", "short_name"),
    [
        (
            "--variance large",
            SamplerOptions(variance="large"),
            "ddpm, trailing, all steps, variance large",
            "ddpm-variance-large",
        ),
        (
            "--sampler dpm++ --steps 9 --spacing trailing --eta 0",
            SamplerOptions("dpm++", 9, "trailing", eta=0.0),
            "dpm++, trailing, 9 steps, eta 0.0",
            "dpmpp9-spacing-trailing-eta-0.0",
        ),
    ],
)
def test_flags_give_the_images_of_their_options(
    flags, options, text, short_name, tiny_run, tmp_path, capsys
):
    flags += " --seed 3 --n 2 --individual --out"
    call(sample.main, tiny_run, *flags.split(), tmp_path)
    assert f"{text}, seed 3" in capsys.readouterr().out
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
    options = SamplerOptions("dpm++", 20, spacing)
    denoiser = Denoiser(torch.nn.Identity(), scheduler)
    image_sampler = ImageSampler(denoiser, options, (3, 16, 16), 0, CPU)
    times = sampling_times(scheduler, 20, spacing)
    assert [image_sampler.time_at(depth) for depth in (0, 1)] == [-1, 999]
    for depth in (0.1, 0.25, 0.6):
        distances = {t: abs(t + 1 - 1000 * depth) for t in times}
        assert distances[image_sampler.time_at(depth)] == min(distances.values())


@pytest.mark.parametrize(("flags", "size"), [([], 16), (["--batch-size", 20], 20)])
def test_a_cpu_samples_few_images_at_a_time(tiny_run, flags, size):
    args = call(partial(sample.parse_flags, 36, False), tiny_run, "--device", "cpu", *flags)
    assert open_sampler(args, SINGLE_PROCESS)[1].batch_size == size
