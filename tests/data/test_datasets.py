"""data/datasets.py: the sets by name, wherever a copy lies, and the splits by id."""

import hashlib
import random
import runpy
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from data import datasets
from data.datasets import ImageSet, load_images, split_images
from functions.support.errors import UserError
from tests.data.packing import IMAGES, ROOT, TREE, write_folder, write_npz, write_zip


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """Return a data folder of the test's own, so that nothing is written beside the modules."""
    folder = tmp_path / "data"
    folder.mkdir()
    embedded_set = shutil.copy(datasets.EMBEDDED_SET, folder / datasets.EMBEDDED_SET.name)
    monkeypatch.setattr(datasets, "DATA_FOLDER", folder)
    monkeypatch.setattr(datasets, "EMBEDDED_SET", embedded_set)
    return folder


def test_the_embedded_set_and_the_people_in_it(data_folder):
    everyone = load_images("emoji_faces", 64)
    assert everyone.images.shape == (1038, 64, 64, 3)
    assert everyone.images.dtype == np.uint8
    assert everyone.ids == sorted(everyone.ids)

    people = load_images("emoji_people", 64)
    assert people.name == "emoji_people"
    assert people.images.shape == (901, 64, 64, 3)
    assert people.ids == [name for name in everyone.ids if name.startswith("people_")]

    # They share a pack, so they share its hash.
    assert people.pixels_hash == everyone.pixels_hash
    assert split_images(people, "reference").pixels_hash == everyone.pixels_hash

    # Some images are compared with their files.
    with zipfile.ZipFile(datasets.EMBEDDED_SET) as archive:
        for position in (0, 450, 900):
            original = Image.open(archive.open(people.ids[position]))
            assert_array_equal(people.images[position], np.asarray(original))


def link_to_a_copy(data):
    copy = write_folder(data.parent / "thumbnails128x128", pattern=TREE)
    (data / "FFHQ").symlink_to(copy)


def write_official_tree(data):
    """Write the images as FFHQ's own download does, with the picture that comes with it."""
    write_folder(data / "FFHQ", IMAGES, f"thumbnails128x128/{TREE}", {"teaser.png": b""})


def write_zip_beside_an_empty_folder(data):
    (data / "FFHQ").mkdir()
    write_zip(data / "FFHQ.zip")


PLACES = {
    "link": link_to_a_copy,
    "official tree": write_official_tree,
    "zip beside": lambda data: write_zip(data / "FFHQ.zip"),
    "npz beside": lambda data: write_npz(data / "FFHQ.npz"),
    "zip inside": lambda data: write_zip(
        data / "FFHQ" / "archive.zip", pattern=f"thumbnails128x128/{TREE}"
    ),
    "npz inside": lambda data: write_npz(data / "FFHQ" / "thumbs.npz"),
    "zip beside an empty folder": write_zip_beside_an_empty_folder,
}


@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_ffhq_is_found_in_every_place(data_folder, put):
    put(data_folder)

    # The second time, the packed file lies there too.
    for _ in range(2):
        image_set = load_images("FFHQ", 8)
        assert image_set.name == "FFHQ"
        assert image_set.ids == list(range(10))
        assert_array_equal(image_set.images, IMAGES)


def test_missing_ffhq_says_how_to_get_it(data_folder):
    with pytest.raises(UserError) as error:
        load_images("FFHQ", 8)
    message = str(error.value)
    assert len(message.splitlines()) == 2
    assert "download_ffhq.py" in message
    assert str(data_folder / "FFHQ") in message


def test_two_archives_are_not_guessed_between(data_folder):
    for name in ("a.zip", "b.zip"):
        write_zip(data_folder / "FFHQ" / name)
    with pytest.raises(UserError, match=r"a\.zip, b\.zip"):
        load_images("FFHQ", 8)


def set_of(ids):
    """Return an image set of these ids, with pixels that nobody reads."""
    return ImageSet("set", np.empty((len(ids), 1, 1, 3), np.uint8), ids)


def hash_of(ids):
    """Return the hash of a side of a split, as checkpoints hold it."""
    lines = "\n".join(map(str, ids))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "train_count"),
    [
        ("reference", 63_000),
        ("official", 60_000),
    ],
)
def test_the_full_set_has_two_splits(name, train_count):
    ids = list(range(70_000))
    split = split_images(set_of(ids), name)

    assert split.train_indices.dtype == np.int64
    assert split.train_indices.tolist() == ids[:train_count]
    assert split.train_ids_hash == hash_of(ids[:train_count])

    assert split.val_indices.dtype == np.int64
    assert split.val_indices.tolist() == ids[train_count:]
    assert split.val_ids_hash == hash_of(ids[train_count:])

    assert name in split.description
    assert f"{train_count:,}" in split.description


@pytest.mark.parametrize("name", ["reference", "official"])
def test_any_other_set_validates_on_its_last_tenth(name):
    # These are nearly the full set.
    nearly_full = [
        # The last image is missing.
        range(69_999),
        # The numbers begin with 1.
        range(1, 70_001),
        # The images have names instead of numbers.
        [str(i) for i in range(70_000)],
    ]
    small = [range(count) for count in range(2, 41)]

    for ids in nearly_full + small:
        split = split_images(set_of(list(ids)), name)
        train_count = len(ids) - max(1, len(ids) // 10)
        assert_array_equal(split.train_indices, np.arange(train_count))
        assert_array_equal(split.val_indices, np.arange(train_count, len(ids)))
        assert "last 10%" in split.description
        assert "\n" not in split.description


def test_an_empty_side_or_an_unknown_split_is_an_error():
    with pytest.raises(UserError, match="too few"):
        split_images(set_of([7]), "reference")
    with pytest.raises(UserError, match=r"'mine'.*'reference' or 'official'"):
        split_images(set_of([1, 2]), "mine")


def generator_states():
    """Return the states of the three generators that a module could draw from."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def test_importing_prints_nothing_and_draws_nothing(monkeypatch, capfd):
    before = generator_states()
    monkeypatch.setattr(sys, "path", sys.path.copy())

    for module in (ROOT / "data").glob("*.py"):
        runpy.run_path(str(module))

    assert generator_states() == before
    assert capfd.readouterr() == ("", "")
