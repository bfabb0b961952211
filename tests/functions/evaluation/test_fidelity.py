"""evaluate.py images: torch-fidelity gets the right images, and measures them anew.

evaluate.py distance: what is measured of samples, beside as many held-out images.
"""

import re

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

import evaluate
import sample
from data.datasets import load_images
from data.packed import ImageSet
from data.pixels import to_model_range
from functions.evaluation import fidelity
from functions.evaluation.fidelity import features_beside, frechet_distance
from tests.conftest import CPU, HELD_OUT, TRAINED, call, normal, refused, samples_of, split_folder
from tests.data.test_datasets import FULL

FAST = "--sampler ddim --steps 1 --individual --device cpu"


class SmallExtractor(FeatureExtractorBase):
    """A network in InceptionV3's place, whose features are mean colours and contrasts."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("6",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "6"

    def forward(self, images):
        assert images.dtype == torch.uint8
        pixels = images.double().flatten(2) / 255
        return (torch.cat([pixels.mean(2), pixels.std(2)], dim=1).float(),)


torch_fidelity.register_feature_extractor("small", SmallExtractor)


def evaluated(capsys, *arguments):
    """Return the numbers that evaluate.py prints, by name, and all that is printed."""
    call(evaluate, "images", *arguments, "--device cpu")
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    numbers = {words[0]: float(words[1]) for words in lines if len(words) == 2}
    return numbers, printed.out + printed.err


def by_hand(samples, real, subset):
    """Return what torch-fidelity measures of two arrays (N, H, W, 3), in six digits."""
    arrays = [torch.tensor(images).permute(0, 3, 1, 2) for images in (samples, real)]
    first, second = (Subset(array, range(len(array))) for array in arrays)
    numbers = torch_fidelity.calculate_metrics(
        input1=first,
        input2=second,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="small",
        kid_subset_size=subset,
        cuda=False,
        cache=False,
        verbose=False,
    )
    return {name: float(f"{value:.6g}") for name, value in numbers.items()}


@pytest.mark.slow
def test_samples_are_compared_as_torch_fidelity_does(
    grey_run, pictures, tmp_path, monkeypatch, capsys
):
    """The truth is torch-fidelity, called by hand on the same arrays."""
    monkeypatch.setattr(fidelity, "EXTRACTOR", "small")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        call(sample, grey_run, FAST, "--n 8 --seed", seed, "--out", folder)
    # A grid in the folder is not an image of the model.
    (folders[0] / "grid.png").touch()
    first, second = (samples_of(folder)[..., None].repeat(3, axis=3) for folder in folders)
    numbers, _ = evaluated(capsys, *folders)
    assert numbers == by_hand(first, second, 4)
    assert numbers["kernel_inception_distance_std"] > 1e-6

    # The data of a grey network are grey. Of 50 pictures 4 are held out.
    grey = load_images(str(pictures), 16, channels=1).images.repeat(3, axis=3)
    numbers, printed = evaluated(capsys, folders[0], pictures)
    assert numbers == by_hand(first, grey[TRAINED], 4)
    assert f"8 images of {folders[0]}, and 46 of {pictures}" in printed
    assert '"sampler": "ddim", "steps": 1' in printed
    assert '"split": "reference"' in printed
    assert "WARNING: ONLY 8 SAMPLES" in printed
    for part, real, subset in (("val", grey[HELD_OUT], 2), ("all", grey, 4)):
        numbers, _ = evaluated(capsys, folders[0], pictures, "--part", part)
        assert numbers == by_hand(first, real, subset)

    # Nothing is kept, so that other pixels under the same name are measured anew.
    assert not (tmp_path / "home").exists()

    with refused("--part is for a data set"):
        evaluated(capsys, *folders, "--part val")
    file = folders[1] / "00003.png"
    file.write_bytes(file.read_bytes()[:-40])
    with refused(r"b/00003\.png: cannot be decoded"):
        evaluated(capsys, *folders)
    Image.new("L", (20, 16)).save(file)
    with refused(r"b/00003\.png has another size than 00000\.png"):
        evaluated(capsys, *folders)
    file.unlink()
    with refused(r"b has 7 images; .* without a gap"):
        evaluated(capsys, *folders)


def test_too_few_real_images_are_one_sentence():
    few = fidelity.Images(3, read=None)
    with refused("there are 3 real images; there must be 4 or more"):
        fidelity.measure_fidelity(few, few, CPU)


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
    """The manifest says it."""
    ffhq = ImageSet("FFHQ", None, FULL, [*map(str, FULL)], "FFHQ")
    monkeypatch.setattr(fidelity, "load_images", lambda name, *_: ffhq)
    write_samples(tmp_path, loaded(pictures, 16)[:1])
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 126
    (tmp_path / "samples.json").write_text('{"split": "official"}')
    _, split = fidelity.load_like(tmp_path, "FFHQ")
    assert len(split.train_indices) == 120
