"""FID, KID, precision and recall, through the path that evaluate.py takes, with a small network for InceptionV3."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity", reason="requirements-eval.txt is not installed")

import functions.evaluation.features
from functions.evaluation.features import Extractor, collect_features, load_inception, statistics
from functions.evaluation.reference_statistics import (
    FORMAT,
    Reference,
    cached_reference,
    describe,
    published_reference,
    read_reference,
    write_reference,
)
from functions.evaluation.report import compare, image_warnings
from functions.support.errors import UserError
from functions.support.processes import Processes
from tests.small_extractor import blurred, small_extractor

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


def features(images, batch_size=64, **options):
    make = lambda batches: (images[batch.start : batch.stop] for batch in batches)
    return collect_features(make, len(images), batch_size, EXTRACTOR, 16, **options)


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
    images, done = photos[0], []
    whole = features(images, on_batch=done.append)
    assert done == [64, 64, 64, 8] and whole.dtype == torch.float32
    torch.testing.assert_close(features(images, batch_size=7), whole)
    parts = []

    class Part(Processes):
        def gather(self, value):
            return [value, 8]

        def sum_(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in range(5):  # of which the last has nothing to do
        features(images, processes=Part(rank, 5))
    assert torch.equal(sum(parts), whole)


def test_images_that_do_not_fit(photos):
    with pytest.raises(UserError, match=r"16 x 8 x 3 torch\.uint8; they must be 16 x 16 x 3"):
        features(photos[0][:, :, :8])
    with pytest.raises(UserError, match="float32"):
        features(photos[0].float())
    with pytest.raises(UserError, match="at least 2"):
        features(photos[0][:1])
    with pytest.raises(UserError, match="nearest neighbours"):
        compare(("prc",), features(photos[0][:3]), reference(photos[1]), seed=0)


def test_few_samples_are_said_loudly():
    assert len(image_warnings({"count": 63_000}, 50_000, 2048)) == 0
    few, singular = image_warnings({"count": 900}, 1_000, 2048)
    assert "1,000 SAMPLES, NOT 50,000" in few and "900 IMAGES FOR 2,048" in singular


def test_reference_is_cached_published_and_checked(photos, tmp_path):
    images, made = photos[0].numpy(), []
    indices = np.arange(10, 60)

    def make():
        made.append(True)
        return features(photos[0][10:60])

    description = describe(images, indices, "abc", "discs", "train", EXTRACTOR)
    first = cached_reference(tmp_path / "cache", description, make)
    again = cached_reference(tmp_path / "cache", description, make)
    assert len(made) == 1 and torch.equal(first.features, again.features)
    np.testing.assert_array_equal(first.statistics["sigma"], again.statistics["sigma"])
    changed = images.copy()
    changed[20, 0, 0, 0] ^= 1  # other pixels under the same ids
    other = describe(changed, indices, "abc", "discs", "train", EXTRACTOR)
    cached_reference(tmp_path / "cache", other, make)
    assert len(made) == 2
    file = next(path for path in (tmp_path / "cache").iterdir() if read_reference(path).description == description)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(first.features.numpy().tobytes()) + 100] ^= 1
    file.write_bytes(damaged)
    cached_reference(tmp_path / "cache", description, make)
    assert len(made) == 3

    public = tmp_path / "discs.npz"
    write_reference(public, first)
    found = published_reference(public, 16, EXTRACTOR)
    assert found.features is None and found.description == description
    with pytest.raises(UserError, match="image_size = 16; here it is 32"):
        published_reference(public, 32, EXTRACTOR)
    with pytest.raises(UserError, match="weights_hash = none; here it is other"):
        published_reference(public, 16, Extractor("small", "other", EXTRACTOR.features))
    with pytest.raises(UserError, match=r"must end in \.npz"):
        write_reference(tmp_path / "discs.bin", first)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "empty set", "nan", "pickle", "other arrays"])
def test_bad_reference_files(kind, tmp_path, photos):
    path, ran = tmp_path / "bad.npz", tmp_path / "ran"
    good = {"mu": np.zeros(8), "sigma": np.eye(8)}
    facts = {
        "format": FORMAT, "dataset": "d", "split": "train", "count": 5, "image_size": 16, "ids_hash": "a",
        "pixels_hash": "b", "extractor": "small", "weights_hash": "none",
    }  # fmt: skip
    text = np.array(json.dumps(facts))
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("mu")
    elif kind == "empty set":
        np.savez(path, description=np.array(json.dumps({**facts, "count": 0})), **good)
    elif kind == "nan":
        np.savez(path, description=text, **{**good, "mu": np.full(8, math.nan)})
    elif kind == "pickle":
        np.savez(path, description=text, mu=np.array([Harm(ran)], dtype=object), sigma=np.eye(8))
    elif kind == "other arrays":
        np.savez(path, description=text, mu=np.zeros(8), sigma=np.eye(7))
    with pytest.raises(UserError, match=r"bad\.npz") as error:
        read_reference(path)
    assert "\n" not in str(error.value) and not ran.exists()


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_that_are_none(tmp_path, monkeypatch):
    missing, harmful = tmp_path / "missing.pth", tmp_path / "harmful.pth"
    with pytest.raises(UserError, match="there is no such file"):
        load_inception(missing, torch.device("cpu"))
    harmful.write_bytes(pickle.dumps(Harm(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError, match="not the weights of torch-fidelity's InceptionV3"):
        load_inception(harmful, torch.device("cpu"))
    torch.save({"fc.weight": torch.zeros(2)}, harmful)
    with pytest.raises(UserError, match="not the weights"):
        load_inception(harmful, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(functions.evaluation.features, "PATIENCE", 2)
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

    keep = {}
    get = lambda network, weights: keep.update(network.state_dict())
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", get)
    weights = tmp_path / "random.pth"
    torch.save({}, weights)
    load_inception(weights, torch.device("cpu"))
    monkeypatch.undo()
    torch.save(keep, weights)
    extractor = load_inception(weights, torch.device("cpu"))
    found = extractor.features(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert (
        found.shape == (2, 2048) and extractor.name == "inception-v3-compat/2048" and len(extractor.weights_hash) == 16
    )
