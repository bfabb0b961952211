"""CIFAR-10 and MNIST by torchvision, from files made here with few images."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from torchvision.datasets import CIFAR10

from data import datasets, prepare
from data.datasets import load_images, split_images
from tests.conftest import call, refused
from tests.data.packing import random_pixels

DIGITS = random_pixels(47, 28, 28, 1)
PHOTOS = random_pixels(107, 32, 32, 3)
# Of each image, the class
LABELS = np.arange(107, dtype=np.uint8) * 3 % 10


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(prepare, "DATA_FOLDER", tmp_path)
    return tmp_path


def idx(*header, content):
    """Return a file as MNIST's page describes it: big-endian numbers and then one byte each."""
    return struct.pack(f">{len(header)}I", *header) + content.tobytes()


@pytest.fixture
def mnist(data_folder):
    """Write 40 training and 7 test images as MNIST's four files; return their folder."""
    folder = data_folder / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, digits, labels in (
        ("train", DIGITS[:40], LABELS[:40]),
        ("t10k", DIGITS[40:], LABELS[40:47]),
    ):
        count = len(digits)
        for kind, data in (
            ("images-idx3", idx(2051, count, 28, 28, content=digits)),
            ("labels-idx1", idx(2049, count, content=labels)),
        ):
            (folder / f"{part}-{kind}-ubyte").write_bytes(data)
    return folder


@pytest.fixture
def cifar10(data_folder, monkeypatch):
    """Write 100 training and 7 test images as CIFAR-10's pickled files; return their folder."""
    folder = data_folder / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    # A row has the red, the green and the blue plane of an image.
    rows = PHOTOS.transpose(0, 3, 1, 2).reshape(107, -1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    ends = range(20, 120, 20)
    parts = zip(names, np.split(rows, ends), np.split(LABELS, ends), strict=True)
    files = [write(name, {"data": data, "labels": labels.tolist()}) for name, data, labels in parts]
    meta = write("batches.meta", {"label_names": [f"kind {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta[1]})
    return folder


@pytest.mark.parametrize(
    "name, images, train_count",
    [
        ("MNIST", DIGITS, 40),
        ("CIFAR10", PHOTOS, 100),
    ],
)
def test_images_come_as_they_were_and_those_of_the_test_files_validate(
    name, images, train_count, request
):
    request.getfixturevalue(name.lower())
    size, channels = images.shape[2:]

    image_set = load_images(name, size, channels=channels, inputs=["label"])
    assert_array_equal(image_set.images, images)
    assert image_set.inputs["label"].tolist() == LABELS[: len(images)].tolist()
    assert image_set.label_names[3] == ("3" if name == "MNIST" else "kind 3")
    assert image_set.ids == list(range(len(images)))
    for split_name in ("reference", "official"):
        split = split_images(image_set, split_name)
        assert split.train_indices.tolist() == list(range(train_count))
        assert split.val_indices.tolist() == list(range(train_count, len(images)))
        assert "its test images" in split.description


def test_other_images_under_the_same_names_are_noticed(mnist):
    assert_array_equal(load_images("MNIST", 28, channels=1).images, DIGITS)
    # Those of FashionMNIST have the names and the number of MNIST's.
    others = 255 - DIGITS[:40]
    file = mnist / "train-images-idx3-ubyte"
    file.write_bytes(idx(2051, 40, 28, 28, content=others))
    assert_array_equal(load_images("MNIST", 28, channels=1).images[:40], others)


def test_a_damaged_or_missing_set_is_one_sentence(mnist, cifar10, data_folder):
    # The file is the packed one, a page of the web, or cut short.
    file = mnist / "train-images-idx3-ubyte"
    for content in (gzip.compress(file.read_bytes()), b"<!DOCTYPE html>", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with refused(r"MNIST cannot be read .* Delete a damaged copy"):
            load_images("MNIST", 28)

    (mnist / "t10k-labels-idx1-ubyte").unlink()
    file.write_bytes(idx(2051, 40, 28, 28, content=DIGITS[:40]))
    with refused(r"MNIST cannot be read .* --download"):
        load_images("MNIST", 28)

    # The pickle is not read, because its md5 is wrong.
    (cifar10 / "data_batch_3").write_bytes(b"")
    with refused(r"CIFAR10 cannot .* binary version is not read.*download"):
        load_images("CIFAR10", 32)


def test_a_set_is_downloaded_only_if_that_is_asked_for(data_folder, monkeypatch):
    calls = []

    def no_network(self):
        calls.append(self.root)
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    with refused("CIFAR10 cannot be read"):
        load_images("CIFAR10", 32)
    assert not calls

    with refused("no network"):
        call(prepare, "CIFAR10 --download")
    assert calls == [data_folder]
    with refused("only CIFAR10 and MNIST can"):
        call(prepare, "FFHQ --download")
