"""Figures: what a network knows of x_0 by band, and the experiments with their distances.

The truths are algebra for networks whose answer is known (gaussian_bands.py), and cosine waves,
whose band is their number of cycles.
"""

import json
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from data.datasets import load_images
from data.pixels import to_model_range
from figures import bands, experiments
from figures.feature_distance import Features, frechet_distance, spoilt
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.spectra import band_sums, octaves, spectrum
from tests.conftest import SMALL_MODEL, LittleMemory, call
from tests.functions.gaussian_bands import (
    MU,
    SCHEDULER,
    VARIANCES,
    by_bands,
    draw_images,
    ideal_eps,
)


def half_the_mean(x_t, t):
    """The ideal denoiser, but its eps has half the mean."""
    return by_bands(ideal_eps(x_t, t), torch.tensor([0.5, 1, 1, 1]))


def expected_ratio(eps, t):
    """Return the ratios (K, bands) by algebra.

    In each band the network's x_0 is mu + c (x_t - sqrt(a) mu). Its squared error has a part of the
    image, (c sqrt(a) - 1)^2 s^2, and a part of the noise, c^2 (1 - a).
    """
    a = SCHEDULER.alphas_cumprod.numpy()[t][:, None]
    s2 = VARIANCES.double().numpy()
    factors = np.array([0.5, 1, 1, 1]) if eps is half_the_mean else 1.0
    # This c follows from x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a) with the eps of Wiener's filter.
    c = (1 - factors * (1 - a) / (a * s2 + 1 - a)) / np.sqrt(a)
    of_image = (c * np.sqrt(a) - 1) ** 2
    of_noise = c**2 * (1 - a) / s2
    return of_image + of_noise


@pytest.mark.parametrize("eps", [ideal_eps, half_the_mean])
def test_the_ratios_of_known_networks(eps):
    """Compare with the algebra, for the ideal denoiser and for one that is wrong in the mean."""
    x_0 = draw_images(100)
    # There is memory for 256 images.
    denoiser = Denoiser(LittleMemory(eps, 256), SCHEDULER)
    result = bands.measure_bands(denoiser, x_0.__getitem__, np.arange(100), MU, 256, 0)
    assert result.t[0] == 0
    assert result.t[-1] == 999
    assert len(result.t) == 12

    # 12 timesteps and 4 bands are 48 cells, each as far off as its standard error allows.
    expected = expected_ratio(eps, result.t)
    deviations = np.abs(result.ratio - expected) / result.standard_error
    assert deviations.max() < 4.5
    # Half of all normal deviations are below 0.67.
    assert 0.4 < np.median(deviations) < 1.2

    if eps is ideal_eps:
        # The linear filter has the s^2 of these 100 images, and the truth that of all.
        assert_allclose(result.linear, expected, rtol=0.3)
        assert "not measurably worse than" in result.verdict()
    else:
        # The sentence names the ratio of the last timestep, in the band of the mean.
        assert expected[-1, 0] > 100
        times_worse = float(result.verdict().split("x_0 is ")[1].split(" times")[0])
        assert times_worse == pytest.approx(result.ratio[-1, 0], rel=0.01)


@pytest.mark.parametrize(("size", "finest"), [(4, 1), (16, 3), (96, 5)])
def test_bands_are_octaves(size, finest):
    """A wave of 1 cycle is in band 1, of 2 or 3 in band 2, and so on up to the finest band."""
    positions = torch.arange(size) * 2 * torch.pi / size
    for cycles in range(size // 2):
        wave = torch.cos(cycles * positions).expand(size, size)
        energy = band_sums(spectrum(wave).abs().square())
        assert len(energy) == finest + 1
        # The band has the wave's whole energy.
        band = min(cycles.bit_length(), finest)
        assert energy[band] == pytest.approx(wave.square().sum().item(), rel=1e-5)

    # The mean is a band by itself. The corner has the highest frequency of both directions.
    bands_of = octaves(size)
    assert (bands_of == 0).sum() == 1
    assert bands_of[size // 2, size // 2] == finest


@pytest.mark.slow
def test_the_script_writes_table_and_map(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bands, "DRAWS", 90)
    # Two dollars in a name are no mathematics.
    [checkpoint] = (tiny_run / "checkpoints").glob("step-00000010.safetensors")
    model = shutil.copy(checkpoint, tmp_path / "$\\frac$.safetensors")
    call(bands.main, model, "--device", "cpu", "--out", tmp_path)
    path = tmp_path / "$\\frac$-bands.json"
    result = json.loads(path.read_text())
    assert result["verdict"] in capsys.readouterr().out
    assert result["bands"] == ["mean", "1-2", "2-4", "finest"]
    assert np.array(result["ratio"]).shape == (len(result["t"]), 4)
    assert result["t"][-1] == 99

    # The best linear filter leaves (1 - a) / (a s^2 + 1 - a) of the variance.
    a = NoiseScheduler(100).alphas_cumprod.numpy()[result["t"]][:, None]
    s2 = np.array(result["variance"])
    assert_allclose(result["linear"], (1 - a) / (a * s2 + 1 - a))
    assert Image.open(path.with_suffix(".png")).width > 1000


@pytest.fixture(scope="module")
def people():
    """Return the images of the data set emoji_people."""
    images = load_images("emoji_people", 32).images
    return to_model_range(torch.from_numpy(images))


def seeded():
    """Return a random generator that starts anew, with seed 0."""
    return torch.Generator().manual_seed(0)


def test_the_feature_distance_orders_the_obvious(people):
    """Held-out images are nearest, then tinted ones; noise is very far."""
    held_out = people[::9]
    distance = Features(people[np.arange(len(people)) % 9 > 0]).distance
    tint = torch.tensor([20, 0, -20]).view(3, 1, 1) / 255
    tinted = (held_out + tint).clamp(-1, 1)
    noise = torch.randn(held_out.shape, generator=seeded()).clamp(-1, 1)

    assert distance(held_out) < distance(tinted)
    assert distance(tinted) < distance(noise) / 5


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """For covariances that commute it is a sum of squared differences.

    These are the differences of means, here 1 and 1, and of standard deviations, here 1 and 2.
    """
    a, b = torch.randn(2, 200_000, 2, generator=seeded(), dtype=torch.float64)
    rotation = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    a = a * torch.tensor([1, 3]) @ rotation + 1
    b = b * torch.tensor([2, 1]) @ rotation

    assert frechet_distance(a, b) == pytest.approx(2 + 1 + 4, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_spoilt_are_dark_and_speckled_images_and_no_real_ones(people):
    dark = people[:20] - 0.2
    noise = torch.randn(20, 3, 32, 32, generator=seeded())
    speckled = (people[:20] + 0.3 * noise).clamp(-1, 1)

    assert not spoilt(people).any()
    assert spoilt(dark).all()
    assert spoilt(speckled).float().mean() > 0.9


@pytest.mark.slow
def test_all_of_it(pictures, tmp_path, monkeypatch, capsys):
    """An arm is trained, measured and drawn on a tiny network, and nothing is done twice."""
    tiny = SMALL_MODEL | {"dim_multiply": (1, 1), "transformer_layers": ()}
    data = {"timesteps_diff": 50, "epochs": 1, "dataset_name": str(pictures)}
    changes = {
        "ARMS": {"eps": (data, tiny, 1)},
        "PICTURES": {"arms.png": ("eps", "eps, calibrated (own)"), "none.png": ("eps", "v")},
        "DISTANCES": {"20 DDIM": experiments.DISTANCES["20 DDIM"]},
        "IMAGE_COUNT": 20,
        "SPOILT_COUNT": 20,
        "RUNS": tmp_path / "runs",
        "RESULTS": tmp_path / "experiments.json",
    }
    for name, value in changes.items():
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr("functions.sampling.calibration.IMAGE_COUNT", 20)
    monkeypatch.setattr("figures.bands.DRAWS", 1)

    # Each part runs once. Its second call finds all there, so the patched work is not called.
    for part, work in (("train", "train.train"), ("measure", "figures.experiments.generate")):
        call(experiments.main, part)
        with patch(work, side_effect=AssertionError("done again")):
            call(experiments.main, part)
    call(experiments.main, "draw")

    # The arm is measured plain, and calibrated in two ways.
    results = json.loads((tmp_path / "experiments.json").read_text())
    assert len(results) == 3
    assert results["eps"]["0"]["distance"]["20 DDIM"] > 0
    printed = capsys.readouterr().out
    assert "| eps, calibrated (own) | 1 |" in printed
    assert "none.png is not drawn, because these are not measured: v" in printed
    # The picture has the two rows of its table, and no others.
    drawn = Image.open(tmp_path / "arms.png")
    assert drawn.height == pytest.approx(drawn.width * 0.16, rel=0.05)
