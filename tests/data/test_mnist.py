"""MNIST's files, made here with few images, and the preset that trains on them."""

import gzip
import struct
from pathlib import Path

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
def with_header(*header, images=IMAGES[:40]):
    return struct.pack(">4I", *header) + images.tobytes()


PARTS = [with_header(2051, 40, 28, 28), with_header(2051, 7, 28, 28, images=IMAGES[40:])]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Write the files to where torchvision puts them, a folder in that of the data set."""
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in zip(FILES, PARTS, strict=True):
        (raw / name).write_bytes(data)
    return raw


@pytest.mark.parametrize("form", ["raw", "packed", "with dots"])
def test_images_come_as_they_were_with_their_numbers(form, raw):
    for file in [*raw.iterdir()]:
        if form == "packed":
            (raw.parent / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        elif form == "with dots":
            file.rename(raw / file.name.replace("-idx", ".idx"))

    image_set = datasets.load_images("MNIST", 28, channels=1)
    assert_array_equal(image_set.images, IMAGES)
    # Test images have their numbers after those of 60,000 training images.
    assert image_set.ids == [*range(40), *range(60_000, 60_007)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "is missing or damaged. Put train-images-idx3-ubyte.gz and t10k"),
        (PARTS[0][:-1], "is missing or damaged"),
        # Labels have another magic number.
        (with_header(2049, 40, 28, 28), "is missing or damaged"),
        (with_header(2051, 39, 28, 28), "is missing or damaged"),
        (with_header(2051, 41, 28, 28), "is missing or damaged"),
        (with_header(2051, 40, 14, 56), "is missing or damaged"),
        (gzip.compress(PARTS[0])[:-9], "cannot be read .* cut short"),
    ],
)
def test_what_is_not_mnist_is_refused_in_a_sentence(data, message, raw):
    file = raw / FILES[0]
    file.unlink()
    if data is not None:
        # A gzip begins with these bytes.
        suffix = ".gz" if data[:2] == b"\x1f\x8b" else ""
        Path(f"{file}{suffix}").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        Mnist(raw.parent)
    assert str(error.value).startswith(str(raw.parent))


@pytest.mark.slow
def test_the_preset_trains(raw, tmp_path, capsys):
    shape = ["--model.image-size", 28, "--model.lowest-resolution-size", 7]
    shape += ["--model.dim-multiply", "1,2,4"]
    runs = tmp_path / "runs"

    call(train.main, "mnist", *TINY, *shape, "--runs", runs)

    assert "MNIST: 40 images train, 7 validate (its test images)" in capsys.readouterr().out
    assert list(runs.glob("mnist-*/checkpoints/*"))
