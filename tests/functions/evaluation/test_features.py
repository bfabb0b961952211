"""FID, KID, precision and recall, along the path that evaluate.py takes.

The truths are the formulas of the papers in NumPy, SciPy and PyTorch. A small network stands in for
InceptionV3.
"""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity", reason="requirements-eval.txt is not installed")

from scipy.linalg import sqrtm
from torch.testing import assert_close
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from data.pixels import to_uint8
from functions.evaluation import features
from functions.sampling.generation import generate
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from tests.conftest import CPU, LittleMemory, image_sampler_of, small_unet
from tests.functions.evaluation.parts import Harm, of_each_process, small_extractor, small_features

EXTRACTOR = small_extractor()
IMAGES = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)


def of_images(batch_size=64, extractor=EXTRACTOR, processes=SINGLE_PROCESS):
    """Return the features of IMAGES."""
    return features.real_features(IMAGES, np.arange(100), batch_size, extractor, processes)


def test_features_of_grey_images_are_those_of_three_equal_channels():
    grey = IMAGES[..., :1]
    found = features.real_features(grey, np.arange(100), 64, EXTRACTOR, SINGLE_PROCESS)
    repeated = torch.from_numpy(grey).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    assert torch.equal(found, small_features(repeated))


@pytest.fixture
def two_sets():
    """Return features of 60 samples and of 60 real images: (60, 5) float32 each.

    They are normal, with other means and other correlations.
    """
    torch.manual_seed(0)
    white = torch.randn(2, 60, 5)
    stretch = torch.randn(2, 5, 5)
    return 0.3 * white[0] @ stretch[0], 0.2 + 0.6 * white[1] @ stretch[1]


def compared(samples, real):
    reference = features.Reference({}, real)
    return features.compare(("fid", "kid", "prc"), samples, reference, seed=-1)


def test_fid_is_the_distance_of_two_gaussians(two_sets):
    """The truth is Heusel's formula in NumPy, with SciPy's root of a matrix."""
    samples, real = (of_set.double().numpy() for of_set in two_sets)
    cov = np.cov(samples.T)
    real_cov = np.cov(real.T)
    gap = samples.mean(axis=0) - real.mean(axis=0)
    expected = gap @ gap + np.trace(cov + real_cov - 2 * sqrtm(cov @ real_cov)).real
    assert compared(*two_sets)["fid"] == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_unbiased_estimate_of_the_cubic_kernel(two_sets):
    """The truth is E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)], over pairs of different images."""

    def kernel(a, b):
        return (a.double() @ b.double().T / 5 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.trace()) / (60 * 59)

    x, y = two_sets
    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    result = compared(x, y)
    assert result["kid"] == pytest.approx(expected.item(), rel=1e-9)
    assert result["kid_subset_size"] == 60
    # Every subset is the whole here, so there is no spread.
    assert result["kid_std"] == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_are_shares_within_the_balls_of_three_neighbours(two_sets):
    """The truth is the definition of Kynkaanniemi et al., over all pairs, in NumPy."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b, axis=2)

    def share_within(points, others):
        """Return how many points are no farther from some other than its third neighbour is."""
        # The nearest of all is the point itself, at index 0.
        radii = np.sort(distances(others, others))[:, 3]
        return (distances(points, others) <= radii).any(axis=1).mean()

    samples, real = (of_set.numpy() for of_set in two_sets)
    result = compared(*two_sets)
    assert result["precision"] == pytest.approx(share_within(samples, real))
    assert result["recall"] == pytest.approx(share_within(real, samples))
    # They are far apart, so they cannot have been exchanged.
    assert 0.1 < result["recall"] < result["precision"] - 0.1


def test_features_depend_on_images_alone():
    """Neither batches nor processes change the features."""
    whole = of_images()
    assert whole.dtype == torch.float32
    channels_first = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    assert_close(whole, small_features(channels_first))
    limited = LittleMemory(small_features, 7)
    assert_close(of_images(7, replace(EXTRACTOR, features=limited)), whole)

    # There are two batches, so the third process has nothing to do.
    parts = of_each_process(3, lambda processes: of_images(processes=processes))
    assert torch.equal(sum(parts), whole)


def test_features_of_samples_are_those_of_the_images_that_are_sampled():
    """The truth is to generate the images in one batch, and to call the network on them."""
    sampler = image_sampler_of(small_unet(), options=SamplerOptions(steps=2))
    pixels = to_uint8(generate(sampler, range(5)).images)
    expected = small_features(pixels.permute(0, 3, 1, 2))
    by_two = replace(sampler, batch_size=2)
    sampled = features.sample_features(by_two, 5, EXTRACTOR, SINGLE_PROCESS)
    # Batches of another size may round a pixel to the next level.
    assert (sampled - expected).abs().max() < 2 / 255
    assert (sampled[0] - sampled[1]).abs().max() > 4 / 255


def test_few_samples_are_said_loudly():
    assert len(features.image_warnings(63_000, 50_000, 2048)) == 0
    few, singular = features.image_warnings(900, 1_000, 2048)
    assert "1,000 SAMPLES, NOT 50,000" in few
    assert "900 IMAGES FOR 2,048" in singular


@pytest.mark.slow
def test_weights_that_are_none(tmp_path, monkeypatch):
    # Loading weights sets this variable. Here it is set first, so that pytest restores it.
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    path = tmp_path / "bad.pth"
    harmed = tmp_path / "ran"

    def saved(weight):
        torch.save({"fc.weight": weight}, path)
        return path.read_bytes()

    wrong_shape = saved(torch.zeros(2))
    for content in (
        # These two would run code.
        pickle.dumps(Harm(harmed), protocol=2),
        saved(Harm(harmed)),
        wrong_shape,
        wrong_shape[:300],
        b"",
        b"weights",
    ):
        path.write_bytes(content)
        message = r"bad\.pth cannot be loaded as the file from https"
        with pytest.raises(UserError, match=message) as error:
            features.load_inception(path, CPU)
        assert "\n" not in str(error.value)
        assert not harmed.exists()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    # Nobody listens at this port.
    url = "https://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth"
    message = r"cannot be downloaded .*127\.0\.0\.1:9.*--weights FILE"
    with pytest.raises(UserError, match=message) as error:
        features.downloaded(url)
    assert "\n" not in str(error.value)

    # The failure leaves no half a file. A file that is there is taken without a network.
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert list(place.parent.iterdir()) == []
    place.touch()
    assert features.downloaded(url) == place


@pytest.mark.slow
def test_the_real_network_takes_our_images(tmp_path, monkeypatch):
    """torch-fidelity's InceptionV3 has random weights here.

    The truth is what it returns itself: 2048 features, from uint8 batches of any size.
    """
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    weights = tmp_path / "random.pth"

    # The network wants a file of weights, so it gets an empty one that it does not look into.
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda network, weights: None)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
    torch.save(network.state_dict(), weights)

    extractor = features.load_inception(weights, CPU)
    images = torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2)
    extracted = extractor.features(images)
    assert extracted.shape == (2, extractor.width) == (2, 2048)
    assert_close(extracted, network(images)[0])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert extractor.facts == {"extractor": "inception-v3-compat/2048", "weights_hash": digest}
