"""Figures: what a network knows of x_0 by band.

The truths are algebra for networks whose answer is known (gaussian_bands.py), and cosine waves,
whose band is their number of cycles.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from figures import bands
from functions.denoiser import Denoiser
from functions.sampling import calibration
from functions.spectra import band_sums, octaves, spectrum
from tests.conftest import LittleMemory, call
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
    # These are the variances of 100 images.
    assert_allclose(result.variance, VARIANCES, rtol=0.3)


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
def test_the_script_writes_table_and_map(tiny_run, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bands, "DRAWS", 90)
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 8)
    # Two dollars in a name are no mathematics.
    [checkpoint] = (tiny_run / "checkpoints").glob("step-00000010.safetensors")
    model = shutil.copy(checkpoint, tmp_path / "$\\frac$.safetensors")
    call(bands.main, model, "--device", "cpu", "--out", tmp_path)
    [path] = tmp_path.glob("$\\frac$-bands-*.json")
    result = json.loads(path.read_text())
    first_line, *lines = capsys.readouterr().out.split("cycles per image\n")[1].splitlines()
    assert first_line.split() == ["t", *result["bands"]]
    printed = np.array([line.split()[1::3] for line in lines[: len(result["t"])]], dtype=float)
    assert_allclose(printed, result["ratio"], rtol=0.01)
    assert result["bands"] == ["mean", "1-2", "2-4", "finest"]
    assert np.array(result["ratio"]).shape == (len(result["t"]), 4)
    assert result["t"][-1] == 99
    assert Image.open(path.with_suffix(".png")).width > 1000

    # Other settings do not overwrite it, and the same ones do.
    first = path.read_bytes()
    fewer = tmp_path / "fewer"
    shutil.copytree(pictures, fewer, ignore=shutil.ignore_patterns("0000*", "*.packed*"))
    changes = ["--seed 1", "--images 3", "--precision bfloat16", "--calibrate own", ""]
    for flags in (*changes, f"--data {fewer}"):
        call(bands.main, model, "--device", "cpu", "--out", tmp_path, *flags.split())
    assert path.read_bytes() == first
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*-bands-*.json")]
    assert len(results) == 6
    assert sorted(result["settings"]["seed"] for result in results) == [0, 0, 0, 0, 0, 1]
