"""figures/experiments.py: the averages kept beside a run's own, the measures, and all of it end to end."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

import train
from figures import experiment_features, experiment_measures, experiment_samplers, experiments
from functions.ema import update_ema
from tests.conftest import TINY, call, small_unet


def test_tracked_averages_are_those_of_update_ema_by_itself():
    averages = {"0.9": experiments.Average(0.9), "plain": experiments.Average(0.9, ramp=False)}
    model = small_unet()
    own = copy.deepcopy(model)
    alone, by_hand, alone_own = (copy.deepcopy(model) for _ in range(3))
    with experiments.tracked(averages) as models:
        assert train.update_ema is not update_ema
        for step in range(5):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter))
            train.update_ema(own, model, step, 0.99)
            update_ema(alone_own, model, step, 0.99)
            update_ema(alone, model, step, 0.9)
            for average, parameter in zip(by_hand.parameters(), model.parameters(), strict=True):
                average.data.copy_(0.9 * average + 0.1 * parameter)
    assert train.update_ema is update_ema
    for found, expected in ((own, alone_own), (models["0.9"], alone)):
        assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert_close(models["plain"].state_dict(), by_hand.state_dict())


def test_feature_distance_orders_the_obvious():
    generator = torch.Generator().manual_seed(0)
    y = torch.linspace(-1, 1, 16)
    radius = (y[:, None] ** 2 + y**2).sqrt()

    def discs(count):
        size = 0.4 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
        colours = 2 * torch.rand(2, count, 3, 1, 1, generator=generator) - 1
        return torch.where(radius < size, colours[0], colours[1])

    features = experiment_features.Features(discs(400))
    real = discs(400)
    blurred = torch.nn.functional.avg_pool2d(real, 5, 1, 2, count_include_pad=False)
    noisy = real + 0.5 * torch.randn(real.shape, generator=generator)
    noise = torch.randn(real.shape, generator=generator).clamp(-1, 1)
    distances = [features.distance(images) for images in (real, blurred, noisy, noise)]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 < distances[1]
    assert experiment_features.Features(real).distance(real) < 1e-9


def test_frechet_distance_of_known_gaussians():
    rows = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(experiment_features.frechet_distance(rows, rows + 2), 12.0)
    centred = rows - rows.mean(0)
    # Commuting covariances: tr (C^1/2 - 2 C^1/2)^2 = tr C
    assert_close(experiment_features.frechet_distance(centred, 2 * centred), rows.T.cov().trace().item())


def test_colours_find_a_tint():
    real = torch.zeros(10, 3, 4, 4)
    samples = real + torch.tensor([0.2, 0.0, -0.2]).view(3, 1, 1)
    samples[:5, 1] += 0.2
    found = experiment_features.colours(samples, real)
    assert_close(found["error"], [25.5, 12.75, -25.5])
    assert found["spread"][0] < 1e-6 < found["spread"][1]
    assert_close(found["error_se"][1], found["spread"][1] / 10**0.5)


def test_rmse_in_pixel_units():
    assert_close(experiment_samplers.rmse(torch.full((2, 3, 4, 4), 1 / 127.5), torch.zeros(2, 3, 4, 4))["rmse"], 1.0)


@pytest.fixture(scope="module")
def tiny_experiments(pictures, tmp_path_factory):
    """Two arms of two steps, measured and drawn; the folder, and the command line without its first word."""
    folder = tmp_path_factory.mktemp("experiments")
    (faces := folder / "faces").mkdir()
    shorter = ["--diffusion.dataset-name", pictures, "--runs", faces, *TINY, "--diffusion.timesteps-diff", 40]
    call(train.main, "faces", *shorter)
    flags = [
        "--runs", folder / "runs", "--results", folder / "results.json", "--picture", folder / "picture.png",
        "--faces", next(faces.iterdir()), "--arms", "T200-as-is", "T1000", "--seeds", 0, "--samples", 8,
        "--sampler-images", 4, "--calls", 2, 5, *TINY, "--diffusion.dataset-name", pictures,
        "--diffusion.epochs", 1, "--diffusion.timesteps-diff", 40,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(experiment_measures, "CALLS", 4)
        for what in ("train", "measure", "samplers", "draw"):
            call(experiments.main, what, *flags)
    return folder, flags


@pytest.mark.slow
def test_end_to_end(tiny_experiments):
    folder, _ = tiny_experiments
    results = json.loads((folder / "results.json").read_text())
    assert results["arms"].keys() == {"T200-as-is", "T1000"}
    row = results["arms"]["T1000"]["0"]
    assert row.keys() == {"raw", "0.998", *experiments.AVERAGES}
    assert row["raw"]["validation_loss"] > 0
    assert row["raw"]["distance"] > 0
    assert row["raw"]["bits"]["total"] > 0
    assert results["arms"]["T200-as-is"]["0"]["0.998, started from noised images"]["distance"] > 0
    assert results["samplers"]["DDIM, trailing"]["5"]["error"]["rmse"] >= 0
    assert (folder / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_there_is_not_done_again(tiny_experiments, monkeypatch, capsys):
    folder, flags = tiny_experiments
    before = (folder / "results.json").read_text()
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(experiment_measures, "arm_samples", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(experiment_samplers, "in_batches", lambda *_: pytest.fail("sampled again"))
    call(experiments.main, "train", *flags)
    call(experiments.main, "measure", *flags)
    call(experiments.main, "samplers", *flags)
    assert (folder / "results.json").read_text() == before
    assert "trained already" in capsys.readouterr().out


def test_a_run_cut_short_is_not_finished(tmp_path):
    (tmp_path / "T1000-seed0-20260101-000000" / "weights").mkdir(parents=True)
    assert experiments.finished_run(tmp_path, "T1000", 0) is None
