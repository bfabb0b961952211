"""data/datasets.py: the sets by name, wherever a copy lies, and the splits by id."""

import hashlib
import shutil
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from data import datasets
from data.datasets import ImageSet, load_images, split_images
from functions.support.errors import UserError
from tests.conftest import script
from tests.data.packing import IMAGES, TREE, write_folder, write_zip


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

    people = load_images("emoji_people", 64)
    assert people.name == "emoji_people"
    assert len(people.images) == 901
    assert people.ids == [name for name in everyone.ids if name.startswith("people_")]

    # The included model names these hashes. The pixels have the pack's.
    split = split_images(people, "reference")
    assert split.pixels_hash == everyone.pixels_hash == "a1efb81a9fa30ee9"
    assert (split.train_ids_hash, split.val_ids_hash) == ("85bfcb9302dc4ef3", "dfaa4145932b2a17")

    # Some images are compared with their files.
    with zipfile.ZipFile(datasets.EMBEDDED_SET) as archive:
        for position in (0, 450, 900):
            original = Image.open(archive.open(people.ids[position]))
            assert_array_equal(people.images[position], np.asarray(original))


def test_ffhq_is_found_in_every_place(data_folder, tmp_path):
    place = data_folder / "FFHQ"
    with pytest.raises(UserError, match=f"python download_ffhq.py .*\nand put it at {place}"):
        load_images("FFHQ", 8)

    def check():
        # The second time, the packed file lies there too.
        for _ in range(2):
            image_set = load_images("FFHQ", 8)
            assert image_set.name == "FFHQ"
            assert image_set.ids == list(range(10))
            assert_array_equal(image_set.images, IMAGES)

    # This is a link to the tree of FFHQ's own download.
    copy = write_folder(tmp_path / "copy", IMAGES, f"thumbnails128x128/{TREE}")
    place.symlink_to(copy)
    check()
    # A picture without a number, or a second one with the same number, would be trained on, too.
    for stray in ("teaser.png", "00003.png"):
        (copy / stray).touch()
        with pytest.raises(UserError, match="a number of its own"):
            load_images("FFHQ", 8)
        (copy / stray).unlink()
    place.unlink()
    # Here is a zip beside an empty folder.
    place.mkdir()
    write_zip(data_folder / "FFHQ.zip")
    check()


def hash_of(ids):
    """Return the hash of a side of a split, as checkpoints hold it."""
    lines = "\n".join(map(str, ids))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


FULL = range(70_000)


@pytest.mark.parametrize(
    ("ids", "test_count", "name", "train_count", "reason"),
    [
        (FULL, 0, "reference", 63_000, "last 10%"),
        (FULL, 0, "official", 60_000, "official split"),
        # MNIST has as many images as FFHQ, and test images of its own.
        (FULL, 10_000, "reference", 60_000, "its test images"),
        (FULL, 10_000, "official", 60_000, "its test images"),
        # The last image of the full set is missing, or the images have names instead of numbers.
        (FULL[:-1], 0, "official", 63_000, "last 10%"),
        (map(str, FULL), 0, "official", 63_000, "last 10%"),
        (range(2), 0, "reference", 1, "last 10%"),
        (range(19), 0, "reference", 18, "last 10%"),
        (range(20), 0, "reference", 18, "last 10%"),
    ],
)
def test_splits_by_id(ids, test_count, name, train_count, reason):
    ids = list(ids)
    # Nobody reads these pixels.
    images = np.empty((len(ids), 1, 1, 3), np.uint8)
    split = split_images(ImageSet("set", images, ids, test_count=test_count), name)

    assert split.train_indices.dtype == split.val_indices.dtype == np.int64
    assert_array_equal(split.train_indices, np.arange(train_count))
    assert_array_equal(split.val_indices, np.arange(train_count, len(ids)))
    assert split.train_ids_hash == hash_of(ids[:train_count])
    assert split.val_ids_hash == hash_of(ids[train_count:])
    assert f"{train_count:,} images train" in split.description
    assert reason in split.description


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="too few"):
        split_images(ImageSet("set", IMAGES[:1], [7]), "reference")


@pytest.mark.slow
def test_loading_images_imports_no_config_preset_or_checkpoint():
    code = "import sys, example; example.load_images('emoji_people', 32); print(*sys.modules)"
    done = script("-c", code)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "data.packed" in modules
    support = {name for name in modules if name.startswith("functions.support.")}
    assert support == {"functions.support.errors", "functions.support.files"}
    assert "config" not in modules
