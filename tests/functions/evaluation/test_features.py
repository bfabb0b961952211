"""FID, KID, precision and recall, through the path that evaluate.py takes, with a small network for InceptionV3."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity", reason="requirements-eval.txt is not installed")

import functions.evaluation.features
from data.pixels import to_uint8
from functions.evaluation.features import (
    Extractor,
    Reference,
    compare,
    image_warnings,
    load_inception,
    real_features,
    sample_features,
    statistics,
)
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate_batches
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS, Processes
from tests.conftest import small_unet
from tests.functions.evaluation.small_extractor import blurred, small_extractor, small_features

ALL = ("fid", "kid", "prc")
EXTRACTOR = small_extractor()


@pytest.fixture(scope="module")
def photos():
    """Two sets of 200 images of one kind, uint8 (200, 16, 16, 3): discs on backgrounds."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    images = np.empty((400, 16, 16, 3), np.uint8)
    for image in images:
        centre, radius, colours = rng.uniform(5, 11, 2), rng.uniform(3, 6), rng.integers(0, 256, (2, 3))
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        image[:] = np.where(inside[..., None], *colours)
    images = torch.from_numpy(images)
    return images[:200], images[200:]


def features(images, batch_size=64, processes=SINGLE_PROCESS, extractor=EXTRACTOR):
    return real_features(images.numpy(), np.arange(len(images)), batch_size, extractor, processes)


def reference(images):
    found = features(images)
    return Reference({}, statistics(found), found)


def test_identical_sets(photos):
    found = compare(ALL, features(photos[0]), reference(photos[0]), seed=0)
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert -5e-3 < found["kid"] < 1e-9 and found["kid_subset_size"] == 200  # unbiased, so just below 0 here
    assert found["precision"] == found["recall"] == 1


def test_gaussian_features_have_the_closed_form():
    """FID of N(m, diag(s^2)) is |m_1 - m_2|^2 + sum (s_1 - s_2)^2; here with exactly these moments."""
    torch.manual_seed(0)
    white = torch.randn(500, 4, dtype=torch.float64)
    white -= white.mean(dim=0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    m_1, m_2, s_1, s_2 = torch.randn(4, 4, dtype=torch.float64).abs()
    real = Reference({}, statistics((m_2 + s_2 * white).float()))
    found = compare(("fid",), (m_1 + s_1 * white).float(), real, seed=0)
    assert found["fid"] == pytest.approx(((m_1 - m_2).square() + (s_1 - s_2).square()).sum().item(), rel=1e-5)


def test_kid_is_the_unbiased_estimate_of_the_cubic_kernel():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), 0.5 + torch.randn(60, 5)
    kernel = lambda a, b: (a.double() @ b.double().T / 5 + 1) ** 3
    off_diagonal = lambda k: (k.sum() - k.trace()) / (60 * 59)
    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    found = compare(("kid",), x, Reference({}, {}, y), seed=0)
    assert found["kid"] == pytest.approx(expected.item(), rel=1e-9)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole, here


def test_precision_and_recall_are_not_exchanged():
    """Samples of one mode out of two: all are precise, half of the real ones are never made."""
    torch.manual_seed(0)
    one, two = torch.randn(100, 3), 50 + torch.randn(100, 3)
    found = compare(("prc",), one + 0.01, Reference({}, {}, torch.cat([one, two])), seed=0)
    assert found["precision"] > 0.95 and 0.4 < found["recall"] <= 0.55


def test_order_of_obvious_cases(photos):
    real, others = photos
    noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cases = [compare(ALL, features(images), reference(real), seed=0) for images in (others, blurred(others), noise)]
    for name in ("fid", "kid"):
        values = [case[name] for case in cases]
        assert values == sorted(values) and values[0] < 0.3 * values[1], name
    assert min(cases[0]["precision"], cases[0]["recall"]) > 0.85
    assert cases[2]["precision"] == cases[2]["recall"] == 0


def test_features_depend_neither_on_batches_nor_on_processes(photos):
    whole = features(photos[0])
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, small_features(photos[0].permute(0, 3, 1, 2)))
    torch.testing.assert_close(features(photos[0], batch_size=7), whole)
    parts = []

    class Part(Processes):
        def sum_(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in range(5):  # of which the last has nothing to do
        features(photos[0], processes=Part(rank, 5))
    assert torch.equal(sum(parts), whole)


def test_what_does_not_fit_in_memory_is_halved_and_gives_the_same_features(photos, capsys):
    images, sizes = photos[0][:40], []

    def extractor_for(most):
        def extract(batch):
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            sizes.append(len(batch))
            return small_features(batch)

        return Extractor(EXTRACTOR.facts, 8, extract, torch.device("cpu"))

    torch.testing.assert_close(features(images, 16, extractor=extractor_for(5)), features(images))
    errors = capsys.readouterr().err
    assert "out of memory with 16 images at a time: going on with 8" in errors
    assert errors.count("going on with 4") == 1 and sizes == [4] * 10  # later batches are not tried whole
    with pytest.raises(UserError, match="no memory for a single image at a time on cpu: CUDA out of memory"):
        features(images, extractor=extractor_for(0))


def test_features_of_samples_are_those_of_the_images_that_are_sampled():
    denoiser, cpu = Denoiser(small_unet(), NoiseScheduler(100)), torch.device("cpu")
    sampler = ImageSampler(denoiser, SamplerOptions(steps=2), (3, 16, 16), 0, cpu)
    (all_at_once,) = generate_batches(sampler, [range(5)])
    expected = small_features(to_uint8(all_at_once.images).permute(0, 3, 1, 2))
    found = sample_features(sampler, 5, 2, EXTRACTOR, SINGLE_PROCESS)
    assert (found - expected).abs().max() < 2 / 255  # a level at a pixel, by rounding
    assert (found[0] - found[1]).abs().max() > 4 / 255


def test_few_samples_are_said_loudly():
    assert len(image_warnings(63_000, 50_000, 2048)) == 0
    few, singular = image_warnings(900, 1_000, 2048)
    assert "1,000 SAMPLES, NOT 50,000" in few and "900 IMAGES FOR 2,048" in singular


def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # so that it is undone afterwards
    path, ran = tmp_path / "bad.pth", tmp_path / "ran"

    class Harm:
        """Unpickled, it makes a file."""

        def __reduce__(self):
            return open, (str(ran), "w")

    def refused():
        with pytest.raises(UserError, match=r"bad\.pth: not the weights that are at https") as error:
            load_inception(path, torch.device("cpu"))
        assert "\n" not in str(error.value) and not ran.exists()
        return str(error.value)

    assert "No such file" in refused()
    path.write_bytes(pickle.dumps(Harm(), protocol=2))
    refused()
    torch.save({"fc.weight": Harm()}, path)
    refused()
    torch.save({"fc.weight": torch.zeros(2)}, path)
    whole = path.read_bytes()
    refused()
    for damaged in (b"", b"weights", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        refused()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth"  # where nobody listens
    with pytest.raises(UserError, match=r"cannot be downloaded .*127\.0\.0\.1:9.*--weights FILE") as error:
        functions.evaluation.features.downloaded(url)
    assert "\n" not in str(error.value)
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert list(place.parent.iterdir()) == []  # no half a file
    place.touch()
    assert functions.evaluation.features.downloaded(url) == place


def test_the_real_network_takes_our_images(tmp_path, monkeypatch):
    """torch-fidelity's InceptionV3 with random weights: its 2048 features, from uint8 batches of any size."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    keep = {}
    get = lambda network, weights: keep.update(network.state_dict())
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", get)
    weights = tmp_path / "random.pth"
    torch.save({}, weights)
    load_inception(weights, torch.device("cpu"))
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", torch.nn.Module.load_state_dict)
    torch.save(keep, weights)
    extractor = load_inception(weights, torch.device("cpu"))
    found = extractor.features(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert found.shape == (2, extractor.width) == (2, 2048)
    assert extractor.facts == {
        "extractor": "inception-v3-compat/2048",
        "weights_hash": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
    }
