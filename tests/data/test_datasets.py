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
    assert people.images.shape == (901, 64, 64, 3)
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
    "zip inside": lambda data: write_zip(
        data / "FFHQ" / "archive.zip", pattern=f"thumbnails128x128/{TREE}"
    ),
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


def set_of(ids, test_count=0):
    """Return an image set of these ids, with pixels that nobody reads."""
    images = np.empty((len(ids), 1, 1, 3), np.uint8)
    return ImageSet("set", images, ids, test_count=test_count)


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

    assert f"{train_count:,} images train" in split.description


@pytest.mark.parametrize("name", ["reference", "official"])
@pytest.mark.parametrize(("train_count", "test_count"), [(60_000, 10_000), (50_000, 10_000)])
def test_own_test_images_are_held_out_whatever_the_number_of_images(name, train_count, test_count):
    """MNIST has as many images as FFHQ, and CIFAR-10 has 60,000."""
    split = split_images(set_of(list(range(train_count + test_count)), test_count), name)
    assert split.train_indices.tolist() == list(range(train_count))
    assert len(split.val_indices) == test_count


@pytest.mark.parametrize("name", ["reference", "official"])
def test_any_other_set_validates_on_its_last_tenth(name):
    # The last image of the full set is missing, or the images have names instead of numbers.
    for ids in (range(69_999), [str(i) for i in range(70_000)], *map(range, range(2, 41))):
        split = split_images(set_of(list(ids)), name)
        train_count = len(ids) - max(1, len(ids) // 10)
        assert_array_equal(split.train_indices, np.arange(train_count))
        assert_array_equal(split.val_indices, np.arange(train_count, len(ids)))
        assert "last 10%" in split.description


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="too few"):
        split_images(set_of([7]), "reference")


def test_loading_images_imports_no_config_preset_or_checkpoint():
    code = "import sys, example; example.load_images('emoji_people', 32); print(*sys.modules)"
    done = script("-c", code)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "data.packed" in modules
    support = {name for name in modules if name.startswith("functions.support.")}
    assert support == {"functions.support.errors", "functions.support.files"}
    assert "config" not in modules
