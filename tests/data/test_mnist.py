"""MNIST's files, made here with few images, and the preset that trains on them."""

import gzip
import struct

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import train
from data import datasets
from data.mnist import FILES, Mnist
from functions.support.errors import UserError
from tests.conftest import TINY, call
from tests.data.packing import random_pixels

IMAGES = random_pixels(47, 28, 28, 1)
# The data set's page describes the header: a magic number, the count, the height and the width.
PARTS = [
    struct.pack(">4I", 2051, len(part), 28, 28) + part.tobytes() for part in np.split(IMAGES, [40])
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write the two files into the folder of the data set, and return the folder."""
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    folder = tmp_path / "MNIST"
    folder.mkdir()
    for name, data in zip(FILES, PARTS, strict=True):
        (folder / name).write_bytes(data)
    return folder


def gzipped(folder):
    for name, data in zip(FILES, PARTS, strict=True):
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))


def as_torchvision(folder):
    """Move the files to where torchvision puts them."""
    (folder / "raw").mkdir()
    for name in FILES:
        (folder / name).rename(folder / "raw" / name)


@pytest.mark.parametrize("form", [lambda folder: None, gzipped, as_torchvision])
def test_images_come_as_they_were_and_the_test_images_validate(form, folder):
    form(folder)
    image_set = datasets.load_images("MNIST", 28, channels=1)
    assert_array_equal(image_set.images, IMAGES)
    # Test images have their numbers after those of 60,000 training images.
    assert image_set.ids == [*range(40), *range(60_000, 60_007)]
    split = datasets.split_images(image_set, "reference")
    assert split.val_indices.tolist() == [*range(40, 47)]

    colour = datasets.load_images("MNIST", 28).images
    assert_array_equal(colour, np.repeat(IMAGES, 3, axis=3))


def header(magic=2051, count=40, height=28, width=28):
    return struct.pack(">4I", magic, count, height, width) + PARTS[0][16:]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (FILES[0], None, "is missing or damaged. Put train-images-idx3-ubyte.gz and t10k"),
        (FILES[0], b"", "is missing or damaged"),
        # Labels have another magic number.
        (FILES[0], header(magic=2049), "is missing or damaged"),
        (FILES[0], header(count=41), "is missing or damaged"),
        (FILES[0], header(count=39), "is missing or damaged"),
        (FILES[0], header(count=10, height=56, width=56), "is missing or damaged"),
        (FILES[0], struct.pack(">4I", 2051, 0, 28, 28), "is missing or damaged"),
        (FILES[0], PARTS[0][:-1], "is missing or damaged"),
        (f"{FILES[0]}.gz", gzip.compress(PARTS[0])[:-9], "cannot be read .* cut short"),
        (f"{FILES[0]}.gz", b"<html>", "cannot be read"),
    ],
)
def test_what_is_not_mnist_is_refused_in_a_sentence(name, data, message, folder):
    (folder / FILES[0]).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        Mnist(folder)
    assert str(error.value).startswith(str(folder))


@pytest.mark.slow
def test_the_preset_trains(folder, tmp_path, capsys):
    shape = ["--model.image-size", 28, "--model.lowest-resolution-size", 7]
    shape += ["--model.dim-multiply", "1,2,4"]
    runs = tmp_path / "runs"

    call(train.main, "mnist", *TINY, *shape, "--runs", runs)

    assert "MNIST: 40 images train, 7 validate (its test images)" in capsys.readouterr().out
    assert list(runs.glob("mnist-*/checkpoints/*"))
