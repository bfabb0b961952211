"""evaluate.py distance: what is measured of samples, beside as many held-out images."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from data.datasets import ImageSet, load_images
from data.pixels import to_model_range
from functions.evaluation import fidelity
from functions.evaluation.feature_distance import Features, frechet_distance, spoilt
from functions.support.errors import UserError
from tests.conftest import HELD_OUT, TRAINED, call
from tests.functions.evaluation.test_fidelity import pixels_of


def distances(capsys, *arguments):
    """Return the numbers at the ends of the lines that `evaluate.py distance` prints, by name."""
    capsys.readouterr()
    call(evaluate.main, "distance", *arguments)
    printed = capsys.readouterr().out
    return dict(re.findall(r"^(d[^:]+): ([\d.e-]+%?)$", printed, re.MULTILINE))


def read(folder, count):
    """Return the first images of a folder, (count, 3, H, W) in [-1, 1]."""
    return to_model_range(torch.from_numpy(pixels_of(folder, count)))


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
    features = Features([people[np.arange(len(people)) % 9 > 0]])
    tint = torch.tensor([20, 0, -20]).view(3, 1, 1) / 255
    tinted = (held_out + tint).clamp(-1, 1)
    noise = torch.randn(held_out.shape, generator=seeded()).clamp(-1, 1)

    # How the images are divided into batches does not matter.
    of_held_out, of_tinted, of_noise = (
        features.distance(features(images.split(7))) for images in (held_out, tinted, noise)
    )
    assert of_held_out < of_tinted < of_noise / 5
    with pytest.raises(UserError, match="needs two images or more"):
        features.distance(features([held_out[:1]]))


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
def test_a_run_and_the_folder_of_its_samples(tiny_run, pictures, tmp_path, capsys):
    """The same flags draw the same samples; in PNG files they are only rounded."""
    run = shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    flags = ["--sampler", "dpm++", "--steps", "4", "--guide", "5", "--seed", "3", "--n", "30"]
    measured = distances(capsys, run, *flags)
    out = tmp_path / "samples"
    call(sample.main, run, *flags, "--individual", "--out", out)
    with pytest.raises(UserError, match=f"{out} has samples; after it, name the DATA"):
        distances(capsys, out)
    of_folder = distances(capsys, out, pictures)

    # The pictures have no white corners. 4 of the 50 are held out.
    real = to_model_range(torch.from_numpy(load_images(str(pictures), 16).images.copy()))
    training, held_out = real[TRAINED], real[HELD_OUT]
    features = Features([training, training.flip(3)])
    truth = {
        "distance": read(out, 30),
        "distance of the first 4 samples, as only 4 are held out": read(out, 4),
        "distance of 4 held-out images": held_out,
    }
    truth = {name: features.distance(features([images])) for name, images in truth.items()}
    assert of_folder == {name: f"{value:.4g}" for name, value in truth.items()}
    measured = {name: float(value) for name, value in measured.items()}
    assert measured == pytest.approx(truth, rel=0.01)


def test_held_out_images_beside_as_many_samples_some_of_them_dark(people, tmp_path, capsys):
    """The samples are the 10 held-out images that are evenly spaced, but 3 of them are dark."""
    pixels = load_images("emoji_people", 32).images[811:][::9]
    for i, image in enumerate(pixels):
        Image.fromarray(image // 2 if i < 3 else image).save(tmp_path / f"{i:05d}.png")
    features = Features([people[:811], people[:811].flip(3)])
    images = {"distance": read(tmp_path, 10), "distance of 10 held-out images": people[811:][::9]}
    truth = {name: f"{features.distance(features([x])):.4g}" for name, x in images.items()}
    measured = distances(capsys, tmp_path, "emoji_people")
    assert measured == {"dark or speckled": "30.00%", **truth}


def test_samples_are_compared_with_the_split_of_their_run(tiny_run, tmp_path, monkeypatch):
    call(sample.main, tiny_run, "--n", 1, "--steps", 1, "--individual", "--out", tmp_path)
    # The run has the other split.
    manifest = tmp_path / "samples.json"
    manifest.write_text(manifest.read_text().replace('"reference"', '"official"'))

    # The full FFHQ, but for its pixels
    ids = list(range(70_000))
    pixels = np.zeros((70_000, 1, 1, 3), np.uint8)
    ffhq = ImageSet("FFHQ", pixels, ids, [*map(str, ids)], "FFHQ")
    monkeypatch.setattr(fidelity, "load_images", lambda name, *_: ffhq)
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 60_000
    manifest.unlink()
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 63_000
