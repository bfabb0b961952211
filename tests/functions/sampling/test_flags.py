"""Samplers by flag: each gives the images of its options, and some flags are refused."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data.pixels import to_uint8
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import predict
from functions.samplers import SAMPLERS, Sampler
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


@torch.no_grad()
def euler_sample(
    model,
    scheduler,
    x_T,
    steps=None,
    spacing="trailing",
    clip_x_0=True,
    step_noise=None,
    on_step=None,
):
    """Solve dy = eps dsigma by Euler's method, with y = x / sqrt(alpha_bar)."""
    x = x_T
    for k, (t, s) in enumerate(pairwise(sampling_times(scheduler, steps, spacing))):
        x_0, eps = predict(model, scheduler, x, t, clip_x_0)
        sigma_t = (1 / scheduler.alpha_bar(t) - 1) ** 0.5
        sigma_s = (1 / scheduler.alpha_bar(s) - 1) ** 0.5
        y = x / scheduler.alpha_bar(t) ** 0.5 + (sigma_s - sigma_t) * eps
        x = scheduler.alpha_bar(s) ** 0.5 * y
        if on_step:
            on_step(k, t, x, x_0)
    return x


def test_a_new_sampler_is_a_function_and_a_row(unfinished, tmp_path, monkeypatch, capsys):
    """DDIM is Euler's method for that equation (Song et al. 2021, Eq. 14): the images agree."""
    row = Sampler(euler_sample, {"spacing": "logsnr"}, "Euler's method")
    monkeypatch.setitem(SAMPLERS, "euler", row)

    with pytest.raises(SystemExit):
        call(sample.main, "--help")
    assert "euler is Euler's method (spacing logsnr)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"^--eta is an option of ddim and dpm\+\+, not of euler$"):
        SamplerOptions("euler", eta=0.5)

    call(train.main, "--resume", unfinished, "--diffusion.grid-sampler", "euler")
    for flags in (["euler"], ["ddim", "--spacing", "logsnr"]):
        out = tmp_path / flags[0]
        call(sample.main, unfinished, "--n", 4, "--steps", 4, "--out", out, "--sampler", *flags)
    script, expected, training = (
        np.asarray(Image.open(path)).astype(float)
        for path in (
            tmp_path / "euler" / "grid.png",
            tmp_path / "ddim" / "grid.png",
            unfinished / "samples" / "step-00000010.png",
        )
    )
    # Rounding differs, and the layout of the networks in memory.
    assert abs(script - expected).max() <= 1
    assert abs(training - expected).max() <= 2


def test_the_rest_of_the_way_is_done_in_the_steps_of_the_whole():
    """From 260 on the next steps are those that the 20 of the whole way have there."""
    scheduler = NoiseScheduler(1000)
    for sampler in ("ddpm", "ddim", "ipndm"):
        options = SamplerOptions(sampler, 20, "trailing")
        assert options.times(scheduler, 999) == options.times(scheduler)
        assert options.times(scheduler, 260) == [260, 249, 199, 149, 99, 49, -1]
    assert SamplerOptions().times(scheduler, 2) == [2, 1, 0, -1]

    # dpm++ begins with no step as short as that from 260 to 249. The last call is always made.
    options = SamplerOptions("dpm++", 20, "trailing")
    assert options.times(scheduler, 260) == [260, 199, 149, 99, 49, -1]
    assert options.times(scheduler, 101) == [101, 49, -1]
    assert options.times(scheduler, 50) == [50, 49, -1]
    assert options.times(scheduler, 20) == [20, -1]

    # On the whole way it keeps all steps, even if the first is so short.
    few = NoiseScheduler(20, rescale_betas=False)
    options = SamplerOptions("dpm++", 14, "trailing")
    assert options.times(few, 19) == options.times(few)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpm_solver_extrapolates_no_further_from_any_start_than_on_the_whole_way(
    steps, beta_schedule, spacing
):
    """A step of order 2 multiplies the difference of two x_0 by 1 / (2 r), r = h_before / h.

    It is so in all steps but the first and the last. A step's h is its difference in log-SNR.
    """
    scheduler = NoiseScheduler(1000, beta_schedule=beta_schedule)
    log_snr = torch.logit(scheduler.alphas_cumprod)
    options = SamplerOptions("dpm++", steps, spacing)

    def factors(times):
        h = log_snr[times[:-1]].diff()
        return h[1:] / (2 * h[:-1])

    # Rounded to timesteps, the whole way in 50 steps with cosine betas has a 2.19 of its own.
    whole = options.times(scheduler)
    assert options.times(scheduler, 999) == whole
    most = max(2, factors(whole).max())
    for start in range(999):
        found = factors(options.times(scheduler, start))
        assert (found[:1] <= 2).all()
        assert (found <= most).all()


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
            "none.png: No such file or directory; give an image file",
        ),
        (["--variations", ROOT / "README.md"], "README.md: not a PNG"),
        (["--variations", tmp_path], "Is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            call(sample.main, tiny_run, *flags, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_run_behind_calibrate_is_not_taken_for_data(tiny_run):
    with pytest.raises(
        UserError, match="this is a run, not a data set; write the run before the flag"
    ):
        call(sample.main, "--calibrate", tiny_run, "--runs", tiny_run.parent)


@pytest.mark.parametrize(("flags", "size"), [([], 16), (["--batch-size", 20], 20)])
def test_a_cpu_samples_few_images_at_a_time(tiny_run, flags, size):
    args = call(partial(sample.parse_flags, 36, False), tiny_run, "--device", "cpu", *flags)
    assert open_sampler(args, SINGLE_PROCESS)[1].batch_size == size


@pytest.mark.parametrize(
    "flags, flag, where",
    [
        ("--export faces --calibrate own", "calibrate", "with --export"),
        ("--export faces --interpolate 1 2", "interpolate", "with --export"),
        ("--export faces --batch-size 2", "batch-size", "with --export"),
        ("--variations 1 --n 7", "n", "with --variations"),
        ("--interpolate 1 2 --variations 1 --gif", "gif", "with --interpolate or --variations"),
        ("--inpaint face.png --depths 1", "depths", "with --inpaint"),
        ("--mask mask.png", "mask", "without --inpaint"),
        ("--depths 1", "depths", "without --interpolate or --variations"),
    ],
)
def test_what_would_be_ignored_is_refused(flags, flag, where):
    with pytest.raises(UserError, match=f"^--{flag} would be ignored {where}$"):
        call(sample.main, "nowhere", *flags.split())


# These are the defaults of sample.py and of sampleFFHQ.py.
@pytest.mark.parametrize("defaults", [(36, False), (20, True)])
def test_what_has_an_effect_is_not_refused(defaults):
    parse = partial(sample.parse_flags, *defaults)
    for flags in (
        "--n 5 --individual --strip --progressive --gif --calibrate",
        "--interpolate 1 2 --variations 3 --depths 1 --fit --calibrate",
        "--inpaint face.png --mask mask.png --resample 2 --n 5 --individual --variations 3 --fit",
        "--export faces --seed 1 --precision bfloat16",
        "--interpolate 1 2 --no-gif",
    ):
        call(parse, *flags.split())

    assert not call(parse, "--no-gif").gif
    # A new flag has a place in the table, too.
    known = sample.ALWAYS.union(sample.ACTION_FLAGS, *sample.ACTION_FLAGS.values())
    assert vars(call(parse)).keys() == known - {"noise"}
