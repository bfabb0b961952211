"""The calibration restores what is known to be damaged, and leaves the ideal denoiser as it is."""

import json
import shlex
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch

import sample
from data.datasets import load_images
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.sampling import calibration
from functions.saved.checkpoint import TensorFile
from functions.support.errors import UserError
from tests.conftest import TRAINED, call, train_tiny
from tests.functions.gaussian_bands import MU, SCHEDULER, by_bands, draw_images, ideal_eps


def damped_x_0(x_t, t, scheduler):
    """Return an eps whose x_0 is the ideal one, with each band made weaker or stronger."""
    x_0 = scheduler.predict_x_0(x_t, t, ideal_eps(x_t, t, scheduler))
    damped = MU + by_bands(x_0 - MU, torch.tensor([0.2, 3.0, 0.5, 0.1]))
    return scheduler.predict_eps(x_t, t, damped)


def damped_eps(x_t, t, scheduler):
    """Return the ideal eps with weaker bands, which is the fault of real networks."""
    return by_bands(ideal_eps(x_t, t, scheduler), torch.tensor([0.5, 1.0, 0.97, 0.9]))


def denoiser_of(eps, scheduler):
    """Return a denoiser whose network is one of these functions."""
    return Denoiser(lambda x_t, t: eps(x_t, t, scheduler), scheduler)


def error_of(denoiser, t):
    """Return the squared error of the denoiser's x_0 on images that nothing was fitted to."""
    x_0 = draw_images(256, seed=5)
    noise = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    predicted, _ = denoiser.predict(denoiser.scheduler.q_sample(x_0, t, noise), t)
    return (predicted - x_0).square().mean().item()


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "eps, worse",
    [
        (damped_x_0, {600: 1.2, 750: 1.01}),
        (damped_eps, {600: 1.05, 999: 10}),
        # What is ideal already stays so, but for the error of a fit to 512 images.
        (ideal_eps, {}),
    ],
)
def test_it_restores_the_ideal_denoiser(eps, worse, beta_schedule):
    """The ideal denoiser is the truth here, and its error is the least that there is.

    In each band both faults mix x_0 and x_t linearly, so the fitted mix can undo them.
    `worse` has the least damage at some timesteps: how many times the error is the ideal one's.
    """
    scheduler = NoiseScheduler(1000, beta_schedule=beta_schedule)
    ideal = denoiser_of(ideal_eps, scheduler)
    damaged = denoiser_of(eps, scheduler)
    fit = calibration.calibrate(damaged, draw_images(512), 256)
    better = calibration.Calibrated(damaged, **fit)

    # Some of these timesteps were fitted, and others lie between.
    for t in (600, 612, 750, 888, 998, 999):
        assert error_of(better, t) < 1.02 * error_of(ideal, t)
    for t, times in worse.items():
        assert error_of(damaged, t) > times * error_of(ideal, t)

    # Below 600 nothing is calibrated.
    assert error_of(better, 599) == error_of(damaged, 599)


def test_it_is_the_formula_for_one_timestep_and_for_many():
    """The truth is mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(a) mu) in each band."""
    weights = torch.rand(1000, 4, 2, generator=torch.Generator().manual_seed(0))
    denoiser = denoiser_of(ideal_eps, SCHEDULER)
    fitted = calibration.Calibrated(denoiser, MU, weights)
    x_t = draw_images(3)
    times = torch.tensor([999, 50, 601])
    x_0, _ = denoiser.predict(x_t, times)
    a = SCHEDULER.alphas_cumprod[times].float().view(-1, 1, 1, 1)
    w_1, w_2 = weights[times].unbind(2)
    expected = MU + by_bands(x_0 - MU, w_1) + by_bands(x_t - a.sqrt() * MU, w_2)

    together, eps = fitted.predict(x_t, times)
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(a.sqrt() * together + (1 - a).sqrt() * eps, x_t)
    clipped, _ = fitted.predict(x_t, times, clip_x_0=True)
    torch.testing.assert_close(clipped, expected.clamp(-1, 1))
    for k, t in enumerate(times.tolist()):
        alone, _ = fitted.predict(x_t[k : k + 1], t)
        torch.testing.assert_close(together[k], alone[0])


FLAGS = shlex.split("--sampler ddim --steps 3 --n 2 --individual --device cpu --calibrate")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "data"])
def test_sample_makes_it_once_and_says_what_it_is_from(
    which, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 12)
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def sampled(name, *flags):
        """Return the first image, sampled into a folder of this name."""
        call(sample.main, run, *FLAGS, which, "--out", tmp_path / name, *flags)
        return (tmp_path / name / "00000.png").read_bytes()

    first = sampled("first")
    [path] = run.glob(f"checkpoints/step-00000010-calibration-{which}-*.safetensors")
    assert f"wrote {path}" in capsys.readouterr().out
    assert json.loads((tmp_path / "first" / "samples.json").read_text())["calibrate"] == which

    # The second time it is read from its file, without the data, and the images are the same.
    with patch.object(calibration, "calibrate", side_effect=AssertionError("fitted again")):
        assert sampled("again") == first

    # Of a damaged one, the user learns what to do.
    data = path.read_bytes()
    for damaged in (data[:100], data[:-1] + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="delete this file, and it is fitted again") as error:
            sampled("damaged")
        assert str(path) in str(error.value)

    # It is fitted in float32, whatever the precision of sampling.
    path.write_bytes(data)
    file = TensorFile(path)
    path.unlink()
    sampled("anew", "--precision", "bfloat16")
    assert vars(TensorFile(path)) == vars(file)


@pytest.mark.slow
def test_it_is_fitted_to_the_images_of_the_training_alone(pictures, tmp_path, monkeypatch):
    """The mean that is kept is that of the 46 training images. Changed images are refused."""
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 46)
    data = shutil.copytree(pictures, tmp_path / "pictures")
    run = train_tiny(data, tmp_path / "runs")
    call(sample.main, run, *FLAGS)
    [path] = run.glob("checkpoints/step-00000010-calibration-data-*.safetensors")
    mean = TensorFile(path).tensors(calibration.PART)["mean"]
    images = load_images(str(data), 16).images
    expected = images[TRAINED].mean(axis=0).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(mean, expected, atol=1e-5)

    # The names stay the same, but one image is another.
    shutil.copy(data / "00001.png", data / "00000.png")
    path.unlink()
    with pytest.raises(UserError, match=r"trained on other images .* use --calibrate own"):
        call(sample.main, run, *FLAGS)
