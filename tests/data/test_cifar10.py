"""CIFAR-10's binary version, made here with few images, in place and packed; the preset that trains on it."""

import os
import shutil
import tarfile

import numpy as np
import pytest

import train
from config import EXPERIMENTS
from data import datasets
from data.cifar10 import FILES, RECORD, Cifar10
from functions.support.errors import UserError
from tests.conftest import TINY, call


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (107, 32, 32, 3), np.uint8)


@pytest.fixture
def unpacked(images, tmp_path):
    """Labels 9, then each image's planes, as the data set's page describes them: 20 a file, and 7 in the last."""
    folder = tmp_path / "CIFAR10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    records = np.insert(images.transpose(0, 3, 1, 2).reshape(107, -1), 0, 9, axis=1)
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(records[20 * i : 20 * (i + 1)].tobytes())
    return tmp_path / "CIFAR10"


@pytest.mark.parametrize("packed", [False, True])
def test_images_come_as_they_were_and_the_test_images_validate(
    packed, images, unpacked, monkeypatch
):
    if packed:  # as published, with a folder in it
        with tarfile.open(unpacked / "cifar-10-binary.tar.gz", "w:gz") as archive:
            archive.add(unpacked / "cifar-10-batches-bin", "cifar-10-batches-bin")
        shutil.rmtree(unpacked / "cifar-10-batches-bin")
    monkeypatch.setattr(datasets, "DATA_FOLDER", unpacked.parent)
    found = datasets.load_images("CIFAR10", 32)
    assert np.array_equal(found.images, images) and found.ids == [
        *range(100),
        *range(50_000, 50_007),
    ]
    split = datasets.split_images(found, "reference")
    assert (len(split.train_indices), split.val_indices.tolist()) == (100, [*range(100, 107)])
    assert "its test images" in split.description


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda file: file.unlink(),
            "data_batch_3.bin is missing or damaged. Put its binary version there",
        ),
        (lambda file: file.write_bytes(b""), "data_batch_3.bin is missing or damaged"),
        (lambda file: os.truncate(file, 5 * RECORD - 1), "data_batch_3.bin is missing or damaged"),
        (lambda file: shutil.rmtree(file.parents[1]), "data_batch_1.bin is missing or damaged"),
        (lambda file: (file.parents[1] / "x.tar.gz").write_bytes(b"no archive"), "cannot be read"),
    ],
)
def test_what_is_not_cifar_10_is_refused_in_a_sentence(spoil, said, unpacked):
    spoil(unpacked / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(UserError, match=said) as caught:
        Cifar10(unpacked)
    assert str(caught.value).startswith(str(unpacked))


def test_the_preset_is_the_papers_and_trains(unpacked, monkeypatch, tmp_path, capsys):
    """Appendix B of Ho et al. 2020: 800,000 steps of 128 images, rate 2e-4, EMA 0.9999, dropout 0.1, flips."""
    diffusion, model = EXPERIMENTS["cifar10"].diffusion, EXPERIMENTS["cifar10"].model
    wanted = dict(
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
        t_sampling="uniform",
        use_augmentation=True,
        max_rotation=0.0,
        lr_schedule="constant",
    )
    assert {name: getattr(diffusion, name) for name in wanted} == wanted and model.dropout == 0.1
    assert 0 <= diffusion.epochs * (50_000 // 128) - 800_000 < 50_000 // 128
    monkeypatch.setattr(datasets, "DATA_FOLDER", unpacked.parent)
    size = ["--model.image-size", 32, "--model.dim-multiply", "1,2,2"]
    call(train.main, "cifar10", *TINY, *size, "--diffusion.epochs", 1, "--runs", tmp_path / "runs")
    assert "CIFAR10: 100 images train, 7 validate (its test images)" in capsys.readouterr().out
    assert len([*(tmp_path / "runs").glob("cifar10-*/checkpoints/*")]) > 0
