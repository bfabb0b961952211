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
    """Two arms are trained, measured and drawn on a tiny network, and nothing is done twice."""
    tiny = SMALL_MODEL | {"dim_multiply": (1, 1), "transformer_layers": ()}
    data = {"timesteps_diff": 50, "epochs": 1, "dataset_name": str(pictures)}
    names = ("eps", "v, uniform t")
    arms = {name: (experiments.ARMS[name][0] | data, tiny, 1) for name in names}
    few = {"20 DDIM": experiments.DISTANCES["20 DDIM"]}
    rows = ("eps", "v, uniform t, calibrated (own)")
    changes = {
        "ARMS": arms,
        "PICTURES": {"arms.png": rows, "none.png": ("eps", "eps, photos")},
        "DISTANCES": few,
        "IMAGE_COUNT": 20,
        "SPOILT_COUNT": 40,
        "RUNS": tmp_path / "runs",
        "RESULTS": tmp_path / "experiments.json",
    }
    for name, value in changes.items():
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr("functions.sampling.calibration.IMAGE_COUNT", 20)
    monkeypatch.setattr("figures.bands.DRAWS", 1)

    # Each part runs once. Its second call finds all there, so the patched work is not called.
    call(experiments.main, "train")
    with patch("train.train", side_effect=AssertionError("trained again")):
        call(experiments.main, "train")
    call(experiments.main, "measure")
    with patch.object(experiments, "generate", side_effect=AssertionError("measured again")):
        call(experiments.main, "measure")
    call(experiments.main, "draw")

    # Each of the two arms is measured plain, and calibrated in two ways.
    results = json.loads((tmp_path / "experiments.json").read_text())
    assert len(results) == 6
    assert results["eps"]["0"]["distance"]["20 DDIM"] > 0
    printed = capsys.readouterr().out
    assert "| v, uniform t, calibrated (own) | 1 |" in printed
    assert "none.png is not drawn, because these are not measured: eps, photos" in printed
    assert not (tmp_path / "none.png").exists()

    # The picture has the two rows of its table, and no others.
    drawn = Image.open(tmp_path / "arms.png")
    assert drawn.height == pytest.approx(drawn.width * 0.16, rel=0.05)
