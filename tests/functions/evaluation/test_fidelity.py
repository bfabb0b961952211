"""evaluate.py images: torch-fidelity gets the right images, and measures them anew."""

import pytest
import torch
import torch_fidelity
from PIL import Image
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

import evaluate
import sample
from data.datasets import load_images
from functions.evaluation import fidelity
from tests.conftest import CPU, HELD_OUT, TRAINED, call, refused, samples_of

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
