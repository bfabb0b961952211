"""figures/experiments.py: what it compares samples by, its arms, and all of it end to end on a tiny network."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import load_images
from data.pixels import to_model_range
from figures import experiments
from figures.feature_distance import Features, frechet_distance, spoilt
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from tests.conftest import SMALL_MODEL, call, small_unet


@pytest.fixture(scope="module")
def people():
    return to_model_range(torch.from_numpy(load_images("emoji_people", 32).images))


def test_the_feature_distance_orders_the_obvious(people):
    """Real images are near the others, tinted ones farther, blurred ones farther still, noise very far."""
    some, others = people[::9], people[np.arange(len(people)) % 9 > 0]
    distance = Features(others).distance
    tinted = (some + torch.tensor([20, 0, -20]).view(3, 1, 1) / 255).clamp(-1, 1)
    blurred = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(some, 2), scale_factor=2, mode="bilinear"
    )
    noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert distance(some) < distance(tinted) < distance(blurred) < distance(noise) / 5


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """With covariances that commute it is the sum of squared differences of means and of standard deviations."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(200_000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    a, b = one * torch.tensor([1, 3]) @ turn + 1, two * torch.tensor([2, 1]) @ turn
    assert frechet_distance(a, b) == pytest.approx(2 + 1 + 4, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_spoilt_are_dark_and_speckled_images_and_no_real_ones(people):
    assert not spoilt(people).any()
    dark = people[:20] - 0.2
    speckled = people[:20] + 0.3 * torch.randn(
        20, 3, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    assert spoilt(dark).all() and spoilt(speckled.clamp(-1, 1)).float().mean() > 0.9


def test_min_snr_weighs_the_error_of_x_0():
    scheduler, t = NoiseScheduler(1000), torch.tensor([0, 300, 700, 999])
    denoiser = Denoiser(small_unet(), scheduler, objective="v")
    x_0, noise = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        losses = experiments.min_snr_loss(denoiser, scheduler, x_0, t, noise)
        x_t = scheduler.q_sample(x_0, t, noise)
        predicted, _ = scheduler.predict_from_v(x_t, t, denoiser(x_t, t))
    a = scheduler.alphas_cumprod[t]
    expected = (a / (1 - a)).clamp(max=5) * (predicted - x_0).double().square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_all_of_it(pictures, tmp_path, monkeypatch, capsys):
    """Train, measure and draw two arms on a tiny network; what is there is not done again."""
    tiny = SMALL_MODEL | {"dim_multiply": (1, 1), "transformer_layers": ()}
    data = {"timesteps_diff": 50, "epochs": 1, "dataset_name": str(pictures)}
    arms = {
        name: (experiments.ARMS[name][0] | data, tiny, 1) for name in ("eps", "v, mixed t, min-SNR")
    }
    monkeypatch.setattr(experiments, "ARMS", arms)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "experiments.json")
    monkeypatch.setattr("functions.sampling.calibration.IMAGES", 20)
    monkeypatch.setattr("functions.evaluation.bands.DRAWS", 1)
    flags = ["--runs", tmp_path / "runs", "--distances", "20 DDIM", "--images", 20, "--spoilt", 200]
    call(experiments.main, "train", *flags)
    with patch("train.train", side_effect=AssertionError("trained again")):
        call(experiments.main, "train", *flags)
    call(experiments.main, "measure", *flags)
    with patch.object(experiments, "generate", side_effect=AssertionError("measured again")):
        call(experiments.main, "measure", *flags)
    call(experiments.main, "draw", "--picture", "arms.png", *flags)
    found = json.loads((tmp_path / "experiments.json").read_text())
    assert len(found) == 6 and found["eps"]["0"]["distance"]["20 DDIM"] > 0
    printed = capsys.readouterr().out
    assert "| v, mixed t, min-SNR, calibrated (own) | 1 |" in printed
    assert Image.open(tmp_path / "arms.png").width > 1000
