"""evaluate.py distance: what is measured of samples, beside as many held-out images."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from data.datasets import load_images
from data.pixels import to_model_range
from functions.evaluation import fidelity
from functions.evaluation.fidelity import features_beside, frechet_distance
from tests.conftest import HELD_OUT, TRAINED, call, normal, refused
from tests.data.test_datasets import FULL, named_set


def distances(capsys, *arguments):
    """Return the ends of the lines that `evaluate.py distance` prints, by what precedes them."""
    capsys.readouterr()
    call(evaluate, "distance", *arguments)
    printed = capsys.readouterr().out
    return dict(re.findall(r"^((?:no )?distance.*): (.+)$", printed, re.MULTILINE))


def loaded(name, size):
    """Return the images of a data set: (N, H, W, 3) uint8."""
    return load_images(str(name), size).images.copy()


def test_the_feature_distance_orders_the_obvious():
    """Held-out images are nearest, then tinted ones; noise is very far."""
    people = to_model_range(loaded("emoji_people", 32))
    held_out = people[::9]
    features = features_beside([people[np.arange(len(people)) % 9 > 0]])
    tint = torch.tensor([20, 0, -20]).view(3, 1, 1) / 255
    tinted = (held_out + tint).clamp(-1, 1)
    noise = normal(0, *held_out.shape).clamp(-1, 1)

    # How the images are divided into batches does not matter.
    of_held_out, of_tinted, of_noise = (
        frechet_distance(features(images.split(7))) for images in (held_out, tinted, noise)
    )
    assert of_held_out < of_tinted < of_noise / 5


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """For covariances that commute it is a sum of squared differences.

    These are the differences of means, here 1 and 1, and of standard deviations, here 1 and 2. The
    features of the real images have the mean 0 and the covariance I.
    """
    images = [to_model_range(loaded("emoji_people", 32))]
    features = features_beside(images)
    assert frechet_distance(features(images)) == pytest.approx(0, abs=1e-9)

    drawn = normal(0, 200_000, 2, dtype=torch.float64)
    rotation = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    drawn = drawn * torch.tensor([2, 3]) @ rotation + 1
    assert frechet_distance(drawn) == pytest.approx(2 + 1 + 4, rel=0.02)


def write_samples(folder, images):
    """Write images (N, H, W, 3) as sample.py --individual names them."""
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def split_folder(pictures, folder, count):
    """Return a folder with the first `count` pictures in train/ and the next one in val/."""
    for i in range(count + 1):
        part = folder / ("train" if i < count else "val")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{i:05d}.png", part)
    return folder


def truths(training, images):
    """Return the distances of images from training images as evaluate.py prints them, by name."""
    features = features_beside([to_model_range(training), to_model_range(training).flip(3)])
    x_0 = {name: to_model_range(pixels) for name, pixels in images.items()}
    return {name: f"{frechet_distance(features([x])):.4g}" for name, x in x_0.items()}


def test_samples_are_measured_beside_as_many_held_out_images(pictures, tmp_path, capsys):
    """Of the 50 pictures 4 are held out, so the first 4 samples are measured, too."""
    samples = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    write_samples(tmp_path, samples)
    real = loaded(pictures, 16)
    few = {
        "distance": samples,
        "distance of the first 4 samples, as only 4 are held out": samples[:4],
        "distance of 4 held-out images": real[HELD_OUT],
    }
    assert distances(capsys, tmp_path, pictures) == truths(real[TRAINED], few)

    one = split_folder(pictures, tmp_path / "data", 20)
    reason = {"no distance of held-out images": "there is one, and a distance needs two"}
    assert distances(capsys, tmp_path, one) == truths(real[:20], {"distance": samples}) | reason


def test_of_many_held_out_images_evenly_spaced_ones_are_measured(tmp_path, capsys):
    people = loaded("emoji_people", 32)
    write_samples(tmp_path, people[:10])
    images = {"distance": people[:10], "distance of 10 held-out images": people[811:][::9]}
    assert distances(capsys, tmp_path, "emoji_people") == truths(people[:811], images)


@pytest.mark.parametrize(
    "size, trained, message",
    [
        (16, 6, "the training images are too few, or too alike"),
        (11, 20, "a distance needs images of 12 pixels a side or more; these have 11"),
    ],
)
def test_a_distance_without_a_meaning_is_refused(size, trained, message, pictures, tmp_path):
    write_samples(tmp_path, loaded(pictures, size)[:10])
    data = split_folder(pictures, tmp_path / "data", trained)
    with refused(message):
        call(evaluate, "distance", tmp_path, data)


def test_samples_are_compared_with_the_split_of_their_run(tiny_run, tmp_path, monkeypatch):
    call(sample, tiny_run, "--n 1 --steps 1 --individual --out", tmp_path)
    # The run has the other split.
    manifest = tmp_path / "samples.json"
    manifest.write_text(manifest.read_text().replace('"reference"', '"official"'))

    ffhq = named_set(map(str, FULL), "FFHQ", FULL)
    monkeypatch.setattr(fidelity, "load_images", lambda name, *_: ffhq)
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 120
    manifest.unlink()
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 126
