"""evaluate.py distance: what is measured of samples, beside as many held-out images."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data.datasets import load_images
from data.packed import ImageSet
from data.pixels import to_model_range
from functions.evaluation import fidelity
from functions.evaluation.fidelity import features_beside, frechet_distance
from tests.conftest import call, normal, refused
from tests.data.test_datasets import FULL


def loaded(name, size):
    """Return the images of a data set: (N, H, W, 3) uint8."""
    return load_images(str(name), size).images.copy()


def test_the_feature_distance_orders_the_obvious():
    """Held-out images are nearest, then tinted ones; noise is very far."""
    people = to_model_range(loaded("emoji_people", 16))[::2]
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


def test_the_frechet_distance_of_gaussians_is_the_closed_form(pictures):
    """For covariances that commute it is a sum of squared differences.

    These are the differences of means, here 1 and 1, and of standard deviations, here 1 and 2. The
    features of the real images have the mean 0 and the covariance I.
    """
    images = [to_model_range(loaded(pictures, 16))]
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


def split_folder(pictures, folder, trained, held_out=1):
    """Return a folder with the first pictures in train/ and the next ones in val/."""
    for i in range(trained + held_out):
        part = folder / ("train" if i < trained else "val")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{i:05d}.png", part)
    return folder


@pytest.mark.parametrize("held_out", [1, 4, 17])
def test_samples_are_measured_beside_as_many_held_out_images(held_out, pictures, tmp_path, capsys):
    """Eight are as many as every second of 17."""
    samples = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    write_samples(tmp_path, samples)
    real = loaded(pictures, 16)
    training = to_model_range(real[:20])
    features = features_beside([training, training.flip(3)])

    def distance(images):
        return f"{frechet_distance(features([to_model_range(images)])):.4g}"

    beside = {
        1: {"no distance of held-out images": "there is one, and a distance needs two"},
        4: {
            "distance of the first 4 samples, as only 4 are held out": distance(samples[:4]),
            "distance of 4 held-out images": distance(real[20:24]),
        },
        17: {"distance of 8 held-out images": distance(real[20:36:2])},
    }
    call(evaluate, "distance", tmp_path, split_folder(pictures, tmp_path / "data", 20, held_out))
    lines = re.findall(r"^((?:no )?distance.*): (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert dict(lines) == {"distance": distance(samples)} | beside[held_out]


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


def test_samples_are_compared_with_the_split_of_their_run(pictures, tmp_path, monkeypatch):
    """The manifest says it (test_fidelity.py)."""
    ffhq = ImageSet("FFHQ", None, FULL, [*map(str, FULL)], "FFHQ")
    monkeypatch.setattr(fidelity, "load_images", lambda name, *_: ffhq)
    write_samples(tmp_path, loaded(pictures, 16)[:1])
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 126
    (tmp_path / "samples.json").write_text('{"split": "official"}')
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 120
