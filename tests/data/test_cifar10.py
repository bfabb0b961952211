"""CIFAR-10's binary version, made here with few images, and the preset that trains on it.

The files are read in place and packed.
"""

import os
import shutil
import tarfile

import numpy as np
import pytest

from config import EXPERIMENTS
from data import datasets
from data.cifar10 import FILES, RECORD, Cifar10
from functions.support.errors import UserError
from tests.data.packing import random_pixels


@pytest.fixture
def images():
    return random_pixels(107, 32, 32, 3)


@pytest.fixture
def unpacked(images, tmp_path):
    """Write the images as the data set's page describes; return the folder of the data set."""
    folder = tmp_path / "CIFAR10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)

    # A record is a label, here 9, and then an image's red, green and blue plane.
    planes = images.transpose(0, 3, 1, 2).reshape(107, -1)
    records = np.insert(planes, 0, 9, axis=1)

    # Each file holds 20 images, and the last one 7.
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(records[20 * i : 20 * (i + 1)].tobytes())
    return tmp_path / "CIFAR10"


@pytest.mark.parametrize("packed", [False, True])
def test_images_come_as_they_were_and_the_test_images_validate(
    packed, images, unpacked, monkeypatch
):
    # The data set is published as an archive with a folder in it.
    if packed:
        folder = unpacked / "cifar-10-batches-bin"
        with tarfile.open(unpacked / "cifar-10-binary.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)
    monkeypatch.setattr(datasets, "DATA_FOLDER", unpacked.parent)

    image_set = datasets.load_images("CIFAR10", 32)
    assert np.array_equal(image_set.images, images)
    # Test images have their numbers after those of 50,000 training images.
    assert image_set.ids == [*range(100), *range(50_000, 50_007)]

    # Its six files have no name for each image.
    assert Cifar10(unpacked).name_of(103) == "image 50003"

    split = datasets.split_images(image_set, "reference")
    assert len(split.train_indices) == 100
    assert split.val_indices.tolist() == [*range(100, 107)]
    assert "its test images" in split.description


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: file.unlink(),
            "data_batch_3.bin is missing or damaged. Put CIFAR-10's binary version there",
        ),
        (lambda file: file.write_bytes(b""), "data_batch_3.bin is missing or damaged"),
        # The last record lacks a byte.
        (lambda file: os.truncate(file, 5 * RECORD - 1), "data_batch_3.bin is missing or damaged"),
        # No file is there at all.
        (lambda file: shutil.rmtree(file.parents[1]), "data_batch_1.bin is missing or damaged"),
        (lambda file: (file.parents[1] / "x.tar.gz").write_bytes(b"no archive"), "cannot be read"),
    ],
)
def test_what_is_not_cifar_10_is_refused_in_a_sentence(spoil, message, unpacked):
    spoil(unpacked / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(UserError, match=message) as error:
        Cifar10(unpacked)
    assert str(error.value).startswith(str(unpacked))


def test_the_preset_is_the_papers():
    """These are the values of Appendix B of Ho et al. 2020."""
    diffusion = EXPERIMENTS["cifar10"].diffusion
    expected = dict(
        learning_rate=2e-4,
        warmup_steps=5000,
        effective_batch=128,
        ema_decay=0.9999,
        clip_grad_norm=1.0,
        timesteps_diff=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        objective="eps",
        use_augmentation=True,
        max_rotation=0.0,
        lr_schedule="constant",
    )
    assert {name: getattr(diffusion, name) for name in expected} == expected
    assert EXPERIMENTS["cifar10"].model.dropout == 0.1

    # The paper trains for 800,000 steps, which end within the last epoch.
    steps_per_epoch = 50_000 // 128
    assert 0 <= diffusion.epochs * steps_per_epoch - 800_000 < steps_per_epoch
