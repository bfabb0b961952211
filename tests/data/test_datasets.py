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
from PIL import Image

from data import datasets
from data.datasets import ImageSet, load_images, split_images
from functions.support.errors import UserError
from tests.data.packing import IMAGES, ROOT, TREE, write_folder, write_npz, write_zip


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A data folder of the test's own, so that nothing is written beside the modules."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(datasets.EMBEDDED_SET, folder)
    monkeypatch.setattr(datasets, "DATA_FOLDER", folder)
    monkeypatch.setattr(datasets, "EMBEDDED_SET", folder / datasets.EMBEDDED_SET.name)
    return folder


def test_the_embedded_set_and_the_people_in_it(data_folder):
    everyone = load_images("emoji_faces", 64)
    people = load_images("emoji_people", 64)
    assert everyone.images.shape == (1038, 64, 64, 3) and everyone.images.dtype == np.uint8
    assert everyone.ids == sorted(everyone.ids)
    assert people.images.shape == (901, 64, 64, 3) and people.name == "emoji_people"
    assert people.ids == [name for name in everyone.ids if name.startswith("people_")]
    with zipfile.ZipFile(datasets.EMBEDDED_SET) as archive:
        for position in (0, 450, 900):
            original = Image.open(archive.open(people.ids[position]))
            np.testing.assert_array_equal(people.images[position], np.asarray(original))


PLACES = {
    "link": lambda data: (data / "FFHQ").symlink_to(
        write_folder(data.parent / "thumbnails128x128", pattern=TREE)
    ),
    "official tree": lambda data: write_folder(
        data / "FFHQ", IMAGES, f"thumbnails128x128/{TREE}", {"teaser.png": b""}
    ),
    "zip beside": lambda data: write_zip(data / "FFHQ.zip"),
    "npz beside": lambda data: write_npz(data / "FFHQ.npz"),
    "zip inside": lambda data: write_zip(
        data / "FFHQ" / "archive.zip", pattern=f"thumbnails128x128/{TREE}"
    ),
    "npz inside": lambda data: write_npz(data / "FFHQ" / "thumbs.npz"),
    "zip beside an empty folder": lambda data: (
        (data / "FFHQ").mkdir(),
        write_zip(data / "FFHQ.zip"),
    ),
}


@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_ffhq_is_found_in_every_place(data_folder, put):
    put(data_folder)
    for _ in range(2):  # the second time, the pack lies there too
        image_set = load_images("FFHQ", 8)
        np.testing.assert_array_equal(image_set.images, IMAGES)
        assert image_set.ids == list(range(10)) and image_set.name == "FFHQ"


def test_missing_ffhq_says_how_to_get_it_and_two_archives_are_not_guessed_between(data_folder):
    with pytest.raises(UserError) as error:
        load_images("FFHQ", 8)
    assert len(str(error.value).splitlines()) == 2
    assert "download_ffhq.py" in str(error.value) and str(data_folder / "FFHQ") in str(error.value)
    for name in ("a.zip", "b.zip"):
        write_zip(data_folder / "FFHQ" / name)
    with pytest.raises(UserError, match=r"a\.zip, b\.zip"):
        load_images("FFHQ", 8)


def set_of(ids):
    return ImageSet("set", np.empty((len(ids), 1, 1, 3), np.uint8), ids)


@pytest.mark.parametrize(("name", "train_count"), [("reference", 63_000), ("official", 60_000)])
def test_the_full_set_has_two_splits(name, train_count):
    ids = list(range(70_000))
    split = split_images(set_of(ids), name)
    assert split.train_indices.dtype == split.val_indices.dtype == np.int64
    assert (
        split.train_indices.tolist() == ids[:train_count]
        and split.val_indices.tolist() == ids[train_count:]
    )
    assert name in split.description and f"{train_count:,}" in split.description
    for ids_hash, listed in (
        (split.train_ids_hash, ids[:train_count]),
        (split.val_ids_hash, ids[train_count:]),
    ):
        assert ids_hash == hashlib.sha256("\n".join(map(str, listed)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["reference", "official"])
def test_any_other_set_validates_on_its_last_tenth(name):
    full_set_as_names = [str(i) for i in range(70_000)]
    for ids in (range(69_999), range(1, 70_001), full_set_as_names, *map(range, range(2, 41))):
        split = split_images(set_of(list(ids)), name)
        first = len(ids) - max(1, len(ids) // 10)
        np.testing.assert_array_equal(split.train_indices, np.arange(first))
        np.testing.assert_array_equal(split.val_indices, np.arange(first, len(ids)))
        assert "last 10%" in split.description and "\n" not in split.description


def test_an_empty_side_or_an_unknown_split_is_an_error():
    with pytest.raises(UserError, match="too few"):
        split_images(set_of([7]), "reference")
    with pytest.raises(UserError, match=r"'mine'.*'reference' or 'official'"):
        split_images(set_of([1, 2]), "mine")


def test_importing_prints_nothing_and_draws_nothing(monkeypatch, capfd):
    generators = lambda: (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    before = generators()
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for module in (ROOT / "data").glob("*.py"):
        runpy.run_path(str(module))
    assert generators() == before and capfd.readouterr() == ("", "")
