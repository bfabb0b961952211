"""FID, KID, precision and recall, through the path that evaluate.py takes, with a small network for InceptionV3."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity", reason="requirements-eval.txt is not installed")

from scipy.linalg import sqrtm
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
    return features.real_features(IMAGES, np.arange(100), batch_size, extractor, processes)


@pytest.fixture
def two_sets():
    """Features of 60 samples and of 60 real images: (60, 5) float32, normal, of different correlated shapes."""
    torch.manual_seed(0)
    white, stretch = torch.randn(2, 60, 5), torch.randn(2, 5, 5)
    return 0.3 * white[0] @ stretch[0], 0.2 + 0.6 * white[1] @ stretch[1]


def compared(samples, real):
    reference = features.Reference({}, features.statistics(real), real)
    return features.compare(("fid", "kid", "prc"), samples, reference, seed=-1)


def test_fid_is_the_distance_of_two_gaussians(two_sets):
    samples, real = (of_set.double().numpy() for of_set in two_sets)
    cov, real_cov = np.cov(samples.T), np.cov(real.T)
    gap = samples.mean(axis=0) - real.mean(axis=0)
    expected = gap @ gap + np.trace(cov + real_cov - 2 * sqrtm(cov @ real_cov)).real
    assert compared(*two_sets)["fid"] == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_unbiased_estimate_of_the_cubic_kernel(two_sets):
    x, y = two_sets
    kernel = lambda a, b: (a.double() @ b.double().T / 5 + 1) ** 3
    off_diagonal = lambda k: (k.sum() - k.trace()) / (60 * 59)
    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    found = compared(x, y)
    assert (
        found["kid"] == pytest.approx(expected.item(), rel=1e-9) and found["kid_subset_size"] == 60
    )
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole, here


def test_precision_and_recall_are_shares_within_the_balls_of_three_neighbours(two_sets):
    def share_within(points, others):
        """How many points are no farther from some other than its third neighbour is."""
        distances = lambda a, b: np.linalg.norm(a[:, None] - b, axis=2)
        radii = np.sort(distances(others, others))[:, 3]  # the first is its own
        return (distances(points, others) <= radii).any(axis=1).mean()

    samples, real = (of_set.numpy() for of_set in two_sets)
    found, expected = (
        compared(*two_sets),
        (share_within(samples, real), share_within(real, samples)),
    )
    assert (found["precision"], found["recall"]) == pytest.approx(expected)
    assert 0.1 < found["recall"] < found["precision"] - 0.1  # so that they cannot be exchanged


def test_features_depend_on_images_alone():
    """Not on batches, on those halved for want of memory, or on the number of processes."""
    whole = of_images()
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, small_features(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)))
    torch.testing.assert_close(of_images(batch_size=7), whole)
    limited = LittleMemory(small_features, 5)
    torch.testing.assert_close(of_images(16, replace(EXTRACTOR, features=limited)), whole)
    assert limited.sizes == [4] * 25
    # The last has nothing to do
    parts = of_each_process(3, lambda processes: of_images(processes=processes))
    assert torch.equal(sum(parts), whole)


def test_features_of_samples_are_those_of_the_images_that_are_sampled():
    sampler = image_sampler_of(small_unet(), options=SamplerOptions(steps=2))
    expected = small_features(to_uint8(generate(sampler, range(5), 5).images).permute(0, 3, 1, 2))
    found = features.sample_features(sampler, 5, 2, EXTRACTOR, SINGLE_PROCESS)
    assert (found - expected).abs().max() < 2 / 255  # a level at a pixel, by rounding
    assert (found[0] - found[1]).abs().max() > 4 / 255


def test_few_samples_are_said_loudly():
    assert len(features.image_warnings(63_000, 50_000, 2048)) == 0
    few, singular = features.image_warnings(900, 1_000, 2048)
    assert "1,000 SAMPLES, NOT 50,000" in few and "900 IMAGES FOR 2,048" in singular


@pytest.mark.slow
def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # so that it is undone afterwards
    path, ran = tmp_path / "bad.pth", tmp_path / "ran"

    def saved(weight):
        torch.save({"fc.weight": weight}, path)
        return path.read_bytes()

    wrong = saved(torch.zeros(2))
    for content in (
        pickle.dumps(Harm(ran), protocol=2),
        saved(Harm(ran)),
        wrong,
        wrong[:300],
        b"",
        b"weights",
    ):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"bad\.pth: not the weights that are at https"
        ) as error:
            features.load_inception(path, CPU)
        assert "\n" not in str(error.value) and not ran.exists()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth"  # where nobody listens
    with pytest.raises(
        UserError, match=r"cannot be downloaded .*127\.0\.0\.1:9.*--weights FILE"
    ) as error:
        features.downloaded(url)
    assert "\n" not in str(error.value)
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert list(place.parent.iterdir()) == []  # no half a file
    place.touch()
    assert features.downloaded(url) == place


@pytest.mark.slow
def test_the_real_network_takes_our_images(tmp_path, monkeypatch):
    """torch-fidelity's InceptionV3 with random weights: its 2048 features, from uint8 batches of any size."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    weights = tmp_path / "random.pth"
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda network, weights: None)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
    torch.save(network.state_dict(), weights)
    extractor, images = (
        features.load_inception(weights, CPU),
        torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2),
    )
    found = extractor.features(images)
    assert found.shape == (2, extractor.width) == (2, 2048)
    torch.testing.assert_close(found, network(images)[0])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert extractor.facts == {"extractor": "inception-v3-compat/2048", "weights_hash": digest}
