"""figures/experiments.py: its measures of samples, its arms, and all of it on a tiny network."""

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
from tests.conftest import SMALL_MODEL, call


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
