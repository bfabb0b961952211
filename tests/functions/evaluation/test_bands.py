"""What a network knows of x_0 by band: exact for networks whose answer is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from functions.evaluation import bands
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.calibration import band_means, octaves, spectrum
from tests.conftest import LittleMemory, call
from tests.functions.evaluation.parts import of_each_process
from tests.functions.gaussian_bands import (
    MU,
    SCHEDULER,
    VARIANCES,
    by_bands,
    draw_images,
    ideal_eps,
)


def half_the_mean(x_t, t):
    """The ideal denoiser, whose eps has half the mean."""
    return by_bands(ideal_eps(x_t, t), torch.tensor([0.5, 1, 1, 1]))


def measured(eps, memory=4096, processes=None, images=100, seed=0):
    x_0, processes = draw_images(images, seed), [processes] if processes else []
    denoiser = Denoiser(LittleMemory(eps, memory), SCHEDULER)
    return bands.measure_bands(
        denoiser, lambda i: x_0[i], np.arange(images), MU, 256, seed, *processes
    )


def expected(eps, times):
    """The ratios by algebra, for x_0' = mu + c (x_t - sqrt(a) mu) in each band."""
    a, s2 = SCHEDULER.alphas_cumprod.numpy()[times][:, None], VARIANCES.double().numpy()
    shrunk = np.array([0.5, 1, 1, 1]) if eps is half_the_mean else 1.0
    c = (1 - shrunk * (1 - a) / (a * s2 + 1 - a)) / np.sqrt(a)
    return (c * np.sqrt(a) - 1) ** 2 + c**2 * (1 - a) / s2


@pytest.mark.parametrize("eps", [ideal_eps, half_the_mean])
def test_the_ratios_of_known_networks(eps):
    result = measured(eps)
    assert result.t[0] == 0 and result.t[-1] == 999 and len(result.t) == 12
    ratio = expected(eps, result.t)
    off = np.abs(result.ratio - ratio) / result.standard_error
    assert off.max() < 4.5 and np.median(off) < 1.2  # 48 cells
    # So this says something
    assert result.standard_error[:, 3].max() / result.ratio[:, 3].max() < 0.02
    if eps is ideal_eps:
        # s^2 of 100 images and not of all
        np.testing.assert_allclose(result.linear, ratio, rtol=0.3)
        assert "not measurably worse than" in result.verdict()
    else:
        assert ratio[-1, 0] > 100
        found = float(result.verdict().split("mean is ")[1].split(" times")[0])
        assert found == pytest.approx(result.ratio[-1, 0], rel=0.01)


def test_the_errors_are_those_of_repetition(monkeypatch):
    monkeypatch.setattr(bands, "DRAWS", 80)
    results = [measured(half_the_mean, images=40, seed=seed) for seed in range(12)]
    spread = np.std([one.ratio for one in results], axis=0, ddof=1)
    stated = np.mean([one.standard_error for one in results], axis=0)
    assert 0.8 < np.median(spread / stated) < 1.25


@pytest.mark.parametrize("size", [4, 8, 16, 32, 96])
def test_bands_are_octaves(size, monkeypatch):
    """A wave of f cycles lies in the band whose name says so; the finest has the corners."""
    monkeypatch.setattr(bands, "DRAWS", 2)
    of, x_0 = octaves(size), torch.rand(2, 3, size, size)
    any_network = Denoiser(LittleMemory(lambda x_t, t: x_t, 4096), SCHEDULER)
    names = bands.measure_bands(any_network, lambda i: x_0[i], np.arange(2), x_0[0], 512, 0).bands
    assert of[0, 0] == 0 and (of == 0).sum() == 1
    for name, low, high in ((name, *map(int, name.split("-"))) for name in names[1:-1]):
        for cycles in range(low, high):
            x = torch.arange(size) * 2 * torch.pi / size
            wave = torch.cos(cycles * x).expand(1, 1, size, size)
            energy = band_means(spectrum(wave).abs().square())[0] * torch.bincount(of.flatten())
            assert energy[names.index(name)] == pytest.approx(wave.square().sum().item(), rel=1e-5)
    assert of[size // 2, size // 2] == len(names) - 1


def test_neither_processes_nor_memory_change_the_result(monkeypatch):
    monkeypatch.setattr(bands, "DRAWS", 27)
    whole = measured(ideal_eps, images=9)
    np.testing.assert_allclose(
        measured(ideal_eps, memory=5, images=9).ratio, whole.ratio, rtol=1e-5
    )
    parts = of_each_process(3, lambda processes: measured(ideal_eps, processes=processes, images=9))
    summed = sum(parts).unflatten(1, (-1, 9)).mean(dim=(1, 2))
    np.testing.assert_allclose(summed / torch.from_numpy(whole.variance), whole.ratio, rtol=1e-9)


def test_the_heat_map_is_red_where_it_is_worse_than_nothing(tmp_path):
    ratio = np.array([[0.01, 0.1], [50.0, 1.0]])
    result = bands.BandErrors([0, 9], ["mean", "finest"], ratio, 0.1 * ratio, ratio, np.ones(2))
    bands.plot_bands(result, tmp_path / "bands.png", "test")
    pixels = np.asarray(Image.open(tmp_path / "bands.png").convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    upper_right, upper_left = (pixels[height // 3, int(width * x)] for x in (0.9, 0.2))
    assert upper_right[0] > upper_right[2] + 50 and upper_left[2] > upper_left[0] + 50
    # Of each column: the frame has two that are black from top to bottom
    black = (pixels.max(axis=2) < 40).sum(axis=0)
    assert (black > height / 5).sum() > 4 and (black[: width // 2] > height / 5).sum() < (
        black > height / 5
    ).sum()


@pytest.mark.slow
def test_evaluate_writes_table_and_map(tiny_run, tmp_path, capsys):
    call(evaluate.main, tiny_run, "--metrics", "bands", "--device", "cpu", "--out", tmp_path)
    (path,) = tmp_path.glob("step-00000010-bands-*.json")
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert found["verdict"] in printed and found["bands"] == ["mean", "1-2", "2-4", "finest"]
    assert np.array(found["ratio"]).shape == (len(found["t"]), 4) and found["t"][-1] == 99
    scheduler = NoiseScheduler(100)
    a, s2 = scheduler.alphas_cumprod.numpy()[found["t"]][:, None], np.array(found["variance"])
    np.testing.assert_allclose(found["linear"], (1 - a) / (a * s2 + 1 - a))
    assert Image.open(path.with_suffix(".png")).width > 1000
