"""evaluate.py distance: what is measured of samples, beside as many held-out images."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from data.datasets import ImageSet, load_images
from data.pixels import to_model_range
from functions.evaluation import fidelity
from functions.evaluation.feature_distance import Features, frechet_distance
from functions.support.errors import UserError
from tests.conftest import HELD_OUT, TRAINED, call


def distances(capsys, *arguments):
    """Return the numbers at the ends of the lines that `evaluate.py distance` prints, by name."""
    capsys.readouterr()
    call(evaluate.main, "distance", *arguments)
    printed = capsys.readouterr().out
    return dict(re.findall(r"^(d[^:]+): ([\d.e+-]+)$", printed, re.MULTILINE))


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


def write_samples(folder, images):
    """Write images (N, H, W, 3) as sample.py --individual names them."""
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def truths(training, **images):
    """Return the distances of images from training images as evaluate.py prints them, by name."""
    training, *others = (
        to_model_range(torch.from_numpy(np.array(x))) for x in (training, *images.values())
    )
    features = Features([training, training.flip(3)])
    distances = [f"{features.distance(features([x])):.4g}" for x in others]
    return dict(zip(images, distances, strict=True))


def test_samples_are_measured_beside_as_many_held_out_images(pictures, tmp_path, capsys):
    """Of the 50 pictures 4 are held out, so the first 4 samples are measured, too."""
    samples = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    write_samples(tmp_path, samples)
    real = load_images(str(pictures), 16).images
    assert distances(capsys, tmp_path, pictures) == truths(
        real[TRAINED],
        **{
            "distance": samples,
            "distance of the first 4 samples, as only 4 are held out": samples[:4],
            "distance of 4 held-out images": real[HELD_OUT],
        },
    )


def test_of_many_held_out_images_evenly_spaced_ones_are_measured(tmp_path, capsys):
    real = load_images("emoji_people", 32).images
    samples = real[:10]
    write_samples(tmp_path, samples)
    held_out = {"distance of 10 held-out images": real[811:][::9]}
    expected = truths(real[:811], distance=samples, **held_out)
    assert distances(capsys, tmp_path, "emoji_people") == expected


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
