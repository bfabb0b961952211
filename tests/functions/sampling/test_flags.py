"""Samplers by flag: each gives the images of its options, and some flags are refused."""

import numpy as np
import pytest
from PIL import Image

import sample
from data.pixels import to_uint8
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import ImageSampler, generate, rebuild
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.errors import UserError
from functions.support.run_folder import checkpoints_of
from models.unet import UNet
from tests.conftest import CPU, ROOT, call


@pytest.mark.parametrize(
    ("flags", "options", "text", "slug"),
    [
        pytest.param(
            "", SamplerOptions(), "ddpm, all steps, variance small", "ddpm", marks=pytest.mark.slow
        ),
        (
            "--steps 9 --variance large",
            SamplerOptions("ddpm", 9, variance="large"),
            "ddpm, 9 steps, trailing, variance large",
            "ddpm9-large",
        ),
        (
            "--sampler dpm++ --steps 8",
            SamplerOptions("dpm++", 8, "logsnr", eta=1.0),
            "dpm++, 8 steps, logsnr, eta 1.0",
            "dpmpp8",
        ),
        (
            "--sampler dpm++ --steps 9 --spacing trailing --eta 0",
            SamplerOptions("dpm++", 9, "trailing", eta=0.0),
            "dpm++, 9 steps, trailing, eta 0.0",
            "dpmpp9-trailing-eta0",
        ),
        (
            "--sampler ddim --steps 7 --eta 0.5 --spacing logsnr",
            SamplerOptions("ddim", 7, "logsnr", eta=0.5),
            "ddim, 7 steps, logsnr, eta 0.5",
            "ddim7-logsnr-eta0.5",
        ),
        (
            "--sampler ipndm --steps 7",
            SamplerOptions("ipndm", 7, "trailing"),
            "ipndm, 7 steps, trailing",
            "ipndm7",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags_give_the_images_of_their_options(
    flags, options, text, slug, tiny_run, tmp_path, capsys
):
    call(
        sample.main,
        tiny_run,
        *flags.split(),
        "--seed",
        3,
        "--n",
        2,
        "--individual",
        "--out",
        tmp_path,
    )
    assert f"{text}, seed 3" in capsys.readouterr().out
    assert str(options) == text
    assert options.slug == slug

    # The files are compared with what these options give in memory.
    denoiser = rebuild(UNet, load_weights(checkpoints_of(tiny_run)[-1]), CPU)
    image_sampler = ImageSampler(denoiser, options, (3, 16, 16), 3, CPU)
    expected = to_uint8(generate(image_sampler, range(2), 2).images)
    images = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    assert np.array_equal(images, expected)


def test_the_rest_of_the_way_is_done_in_the_steps_of_the_whole():
    """From 260 on the next steps are those that the 20 of the whole way have there."""
    scheduler = NoiseScheduler(1000)
    options = SamplerOptions("dpm++", 20, "trailing")
    assert options.times(scheduler, 999) == options.times(scheduler)
    assert options.times(scheduler, 260) == [260, 249, 199, 149, 99, 49, -1]
    assert SamplerOptions().times(scheduler, 2) == [2, 1, 0, -1]


def test_images_that_do_not_fit_are_refused(tiny_run, pictures, tmp_path):
    picture = pictures / "00000.png"
    right = tmp_path / "right.png"
    tall = tmp_path / "tall.png"
    broken = tmp_path / "broken.png"
    Image.new("RGB", (16, 16)).save(right)
    Image.new("RGB", (16, 20)).save(tall)
    broken.write_bytes(picture.read_bytes()[:60])

    for flags, message in (
        (
            ["--variations", picture],
            "00000.png is 20x20 pixels, the model's images are 16x16; --fit",
        ),
        (["--interpolate", right, tall], "tall.png is 16x20 pixels"),
        (["--interpolate", right, broken], "broken.png: "),
        (
            ["--variations", tmp_path / "none.png"],
            "none.png: No such file or directory; an image is named by",
        ),
        (["--variations", ROOT / "README.md"], "README.md: not a PNG"),
        (["--variations", tmp_path], "Is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            call(sample.main, tiny_run, *flags, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_run_behind_calibrate_is_not_taken_for_data(tiny_run):
    with pytest.raises(UserError, match="that is a run, not data; write the run before the flag"):
        call(sample.main, "--calibrate", tiny_run, "--runs", tiny_run.parent)
